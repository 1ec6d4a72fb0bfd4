"""The losses of fine-tuning."""

import numpy as np
import pytest
import torch as th

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.training import losses


class TestLoss:
    masks = th.tensor([[[0, 1], [2, IGNORE]]])

    def test_each_name_stands_for_its_own_parts(self):
        scores = th.randn(1, 3, 2, 2, generator=th.Generator().manual_seed(0))
        both, entropy, dice = (
            float(losses.SegmentationLoss(kind)(scores, self.masks)) for kind in losses.LOSSES
        )
        assert both == pytest.approx(entropy + dice)
        expected = th.nn.functional.cross_entropy(scores, self.masks, ignore_index=IGNORE)
        assert entropy == pytest.approx(float(expected))
        assert 0 < dice < 1

    def test_dice_is_monais(self):
        from monai.losses import MaskedDiceLoss

        scores = th.randn(4, 3, 5, 5, generator=th.Generator().manual_seed(1))
        masks = th.randint(0, 3, (4, 5, 5), generator=th.Generator().manual_seed(2))
        masks[0, :2] = IGNORE
        known = masks != IGNORE
        truth = th.nn.functional.one_hot(masks.where(known, 0), 3).movedim(-1, 1).float()
        expected = MaskedDiceLoss(batch=True)(scores.softmax(1), truth, known[:, None].float())
        th.testing.assert_close(losses.SegmentationLoss("dice")(scores, masks), expected)

    @pytest.mark.parametrize("kind", losses.LOSSES)
    def test_a_batch_without_labels_has_no_gradient(self, kind):
        scores = th.randn(1, 3, 2, 2, requires_grad=True)
        loss = losses.SegmentationLoss(kind)(scores, th.full((1, 2, 2), IGNORE))
        loss.backward()
        assert loss.item() == pytest.approx(0)
        assert not scores.grad.any()

    @pytest.mark.parametrize("kind", losses.LOSSES)
    def test_perfect_scores_cost_nothing_and_ignored_pixels_do_not_count(self, kind):
        loss = losses.SegmentationLoss(kind)
        truth = self.masks.where(self.masks != IGNORE, 0)
        scores = 50.0 * th.nn.functional.one_hot(truth, 3).movedim(-1, 1)
        assert float(loss(scores, self.masks)) == pytest.approx(0, abs=1e-4)
        scores[:, :, 1, 1] = th.tensor([-50.0, 50.0, 0.0])
        assert float(loss(scores, self.masks)) == pytest.approx(0, abs=1e-4)
        assert float(loss(-scores.float(), self.masks)) > 0.5

    @pytest.mark.parametrize("kind", losses.LOSSES)
    def test_an_unknown_class_is_one_with_the_background(self, kind):
        """Only in the image whose mask does not show it."""
        masks = th.tensor([[[0, 1], [0, IGNORE]], [[2, 2], [1, 0]]])
        scores = th.randn(2, 3, 2, 2, generator=th.Generator().manual_seed(3), requires_grad=True)
        found = losses.SegmentationLoss(kind, unknown=th.tensor([True] * 3))(scores, masks)
        known = scores.softmax(1).detach().clone()
        known[0, 0] += known[0, 2]
        known[0, 2] = 0
        expected = losses.SegmentationLoss(kind)(known.log().nan_to_num(neginf=-1e4), masks)
        th.testing.assert_close(found, expected)
        assert found.item() != pytest.approx(losses.SegmentationLoss(kind)(scores, masks).item())
        found.backward()
        assert th.isfinite(scores.grad).all()
        # more of the one at the cost of the other changes nothing
        mass = scores.softmax(1)[0, [0, 2]].detach()
        there = (scores.grad[0, 0] / mass[0] - scores.grad[0, 2] / mass[1])[masks[0] != IGNORE]
        assert there.abs().max() < 1e-5

    @pytest.mark.parametrize("kind", losses.LOSSES)
    def test_where_masks_show_every_class_none_is_unknown(self, kind):
        masks = th.tensor([[[0, 1], [2, 1]]])
        scores = th.randn(1, 3, 2, 2, generator=th.Generator().manual_seed(4))
        one, other = (
            losses.SegmentationLoss(kind, unknown=unknown)(scores, masks)
            for unknown in (None, th.tensor([True] * 3))
        )
        th.testing.assert_close(one, other)

    def test_only_classes_that_may_be_unknown_join_the_background(self):
        masks = th.tensor([[[0, 1], [0, 1]]])
        scores = th.randn(1, 4, 2, 2, generator=th.Generator().manual_seed(5))
        unknown = th.tensor([True, True, False, True])
        joined = scores.clone()
        joined[:, 0] = scores[:, [0, 3]].logsumexp(1)
        joined[:, 3] = -1e4
        expected = losses.SegmentationLoss()(joined, masks)
        found = losses.SegmentationLoss(unknown=unknown)(scores, masks)
        th.testing.assert_close(found, expected)

    def test_weights_favour_the_rare(self):
        pixels = np.array([900, 90, 10, 0])
        inverse = losses.class_weights(pixels, "inverse")
        root = losses.class_weights(pixels, "sqrt")
        assert losses.class_weights(pixels, "none") is None
        assert inverse[2] / inverse[0] == pytest.approx(90)
        assert root[2] / root[0] == pytest.approx(90**0.5)
        assert inverse[:3].mean() == pytest.approx(1)
        with pytest.raises(UserError, match="class_weighting"):
            losses.class_weights(pixels, "log")
