"""Figures of merit against brute force and theory; scripts/evaluate_samples.py."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sampling_util import CLASSES, NETWORK, write_shapes, write_trained

from guided_diffusion.sampling import quality as sample_quality
from guided_diffusion.sampling.evaluation import load_samples
from guided_diffusion.sampling.quality import (
    copying,
    distances,
    frechet_distance,
    manifold_metrics,
    nearest_real,
)


def by_definition(real, samples, k):
    """Equations of arXiv 1904.06991 and 2002.09797 as they stand, point by point."""

    def radius(points, i):
        others = [np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i]
        return sorted(others)[k - 1]

    def inside(a, points, i):
        return np.linalg.norm(a - points[i]) <= radius(points, i) + 1e-12

    hits = [sum(inside(s, real, i) for i in range(len(real))) for s in samples]
    return {
        "precision": np.mean([hit > 0 for hit in hits]),
        "recall": np.mean([any(inside(r, samples, i) for i in range(len(samples))) for r in real]),
        "density": np.mean(hits) / k,
        "coverage": np.mean([any(inside(s, real, i) for s in samples) for i in range(len(real))]),
    }


class TestFigures:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32), st.integers(1, 3), st.floats(0, 3), st.sampled_from([2, 1024]))
    def test_they_are_what_their_definitions_say(self, seed, k, shift, chunk):
        rng = np.random.default_rng(seed)
        real, samples = rng.normal(size=(9, 3)), rng.normal(size=(6, 3)) + shift
        before, sample_quality._CHUNK = sample_quality._CHUNK, chunk
        try:
            found = manifold_metrics(real, samples, k)
        finally:
            sample_quality._CHUNK = before
        assert found == pytest.approx(by_definition(real, samples, k))

    def test_same_distribution_and_one_that_is_elsewhere(self):
        rng = np.random.default_rng(0)
        real, same = rng.normal(size=(2, 1000, 4))
        good = manifold_metrics(real, same)
        assert min(good.values()) > 0.9
        assert good["density"] == pytest.approx(1, abs=0.1)
        assert set(manifold_metrics(real, same + 50).values()) == {0.0}

    def test_one_sample_repeated_is_precise_and_covers_nothing(self):
        rng = np.random.default_rng(0)
        real = rng.normal(size=(500, 4))
        found = manifold_metrics(real, np.repeat(real[:1] * 0.1, 500, axis=0))
        assert found["precision"] == 1
        assert found["recall"] < 0.01
        assert found["coverage"] < 0.1

    def test_distances(self):
        a, b = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
        expected = np.linalg.norm(a[:, None].astype(float) - b[None], axis=2)
        assert np.allclose(distances(a, b), expected, atol=1e-7)
        assert np.allclose(distances(a + 100, a + 100).diagonal(), 0, atol=1e-4)

    def test_frechet_distance_of_normal_distributions(self):
        """|m|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), here with covariances that do not commute."""
        rng = np.random.default_rng(0)
        white = rng.normal(size=(4000, 3))
        white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
        one, two = rng.normal(size=(2, 3, 3))
        shift = np.array([1.0, -2.0, 0.5])
        values, vectors = np.linalg.eig(one @ one.T @ two @ two.T)
        root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
        expected = shift @ shift + np.trace(one @ one.T + two @ two.T - 2 * root.real)
        assert frechet_distance(white @ one.T, white @ two.T + shift) == pytest.approx(expected)

    def test_frechet_distance_of_the_same_images_is_zero(self):
        few = np.random.default_rng(0).normal(size=(10, 40))  # fewer than dimensions
        assert 0 <= frechet_distance(few, few[::-1]) < 1e-4

    def test_copies_are_told_from_new_images(self):
        rng = np.random.default_rng(0)
        real, new = rng.normal(size=(2, 300, 8))
        copies = real[:50] + rng.normal(size=(50, 8)) * 0.01
        found = nearest_real(real, copies)
        assert found.index.tolist() == list(range(50))
        assert copying(real, found) < 0.05
        assert copying(real, nearest_real(real, new)) == pytest.approx(1, abs=0.15)


@pytest.fixture
def offline(tmp_path):
    """Samples, real images and flags for features that need no download."""
    model = write_trained(tmp_path / "run")
    real = write_shapes(tmp_path / "real", count=20)
    samples = write_shapes(tmp_path / "samples", count=12)
    flags = ("--features", "ddpm", "--model_path", model)
    return samples, real, flags


class TestScript:
    def test_copies_are_found_and_shown(self, script, offline, tmp_path):
        samples, real, flags = offline
        out = tmp_path / "out"
        done = script("evaluate_samples.py", samples, real, *flags, "--out_dir", out)
        assert done.code == 0, done.err
        assert "middle block of the diffusion network" in done.out
        assert "at timestep 2 of 50" in done.out
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["samples"]["count"] == 12
        assert metrics["reference"]["count"] == 20
        figures = metrics["of_samples"]
        assert figures["nearest_distance"] < 1e-3
        assert figures["precision"] == 1
        assert metrics["of_real_images"]["nearest_distance"] > 0.5
        for name in (*figures, "samples", "real images"):
            assert name.replace("_", " ") in done.out
        with open(out / "nearest.csv") as file:
            rows = {row["sample"]: row for row in csv.DictReader(file)}
        assert len(rows) == 12
        for name, row in rows.items():  # the same picture, perhaps under another name
            picture = np.asarray(Image.open(samples / f"{name}.png"))
            for column in ("nearest_by_pixels", "nearest_by_features"):
                assert np.array_equal(picture, np.asarray(Image.open(row[column])))
            assert float(row["rms_difference"]) == 0
        page = Image.open(out / "nearest" / "page_000.png")
        assert page.size == (12 * 66, 3 * 78)

    def test_many_samples_take_several_pages(self, script, offline, tmp_path):
        _, real, flags = offline
        many = write_shapes(tmp_path / "many", count=40)
        out = tmp_path / "out"
        assert script("evaluate_samples.py", real, many, *flags, "--out_dir", out).code == 0
        assert len(list((out / "nearest").iterdir())) == 1
        assert script("evaluate_samples.py", many, real, *flags, "--out_dir", out).code == 0
        assert len(list((out / "nearest").iterdir())) == 2

    def test_the_folder_of_a_sampling_script(self, script, offline):
        _, real, flags = offline
        model = flags[-1]
        sampled = ("--sampler", "dpm++2m", "--steps", 3, "--num_samples", 12)
        assert script("image_sample.py", "--model_path", model, *sampled).code == 0
        (folder,) = (model.parent / "samples").iterdir()
        done = script("evaluate_samples.py", folder, real, *flags)
        assert done.code == 0, done.err
        one = json.loads((folder / "evaluation_ddpm" / "metrics.json").read_text())
        done = script("evaluate_samples.py", folder / "samples_12x16x16x1.npz", real, *flags)
        assert done.code == 0, done.err
        two = json.loads((folder / "evaluation_ddpm" / "metrics.json").read_text())
        assert one["of_samples"] == two["of_samples"]
        assert one["of_samples"]["nearest_distance"] > 0.5

    def test_real_images_are_read_as_the_network_learned_to_see_them(self, script, offline):
        """The record beside the samples says: padded, not cropped."""
        samples, real, flags = offline
        (samples / "png").mkdir()
        for path in samples.glob("*.png"):
            path.rename(samples / "png" / path.name)
        reading = {"image_size": 16, "in_channels": 1, "resize": "pad"}
        (samples / "sampling.json").write_text(json.dumps({"reading": reading, "images": {}}))
        for path in real.iterdir():
            image = np.asarray(Image.open(path))
            Image.fromarray(np.pad(image, ((0, 0), (8, 8)))).save(path)
        found = []
        for more in ((), ("--resize", "crop")):
            done = script("evaluate_samples.py", samples, real, *flags, *more)
            assert done.code == 0, done.err
            metrics = json.loads((samples / "evaluation_ddpm" / "metrics.json").read_text())
            found.append(metrics["of_samples"]["nearest_distance"])
        assert found[0] > 0.1
        assert found[1] < 1e-3

    def test_a_classifier_of_torchvision_with_weights_from_a_file(self, script, offline, tmp_path):
        import torchvision

        samples, real, _ = offline
        th.manual_seed(0)
        network = torchvision.models.resnet18(weights=None)
        th.save(network.state_dict(), tmp_path / "resnet18.pth")
        flags = ("--features", "resnet18", "--weights", tmp_path / "resnet18.pth")
        done = script("evaluate_samples.py", samples, real, *flags, "--out_dir", tmp_path / "out")
        assert done.code == 0, done.err
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["dimensions"] == 512
        assert "torchvision's resnet18" in metrics["features"]
        assert metrics["of_samples"]["nearest_distance"] < 1e-3
        done = script("evaluate_samples.py", samples, real, "--features", "resnet50", *flags[2:])
        assert done.code == 2
        assert "is no state_dict of resnet50" in done.err

    def test_weights_that_cannot_be_fetched(self, script, offline, monkeypatch, tmp_path):
        samples, real, _ = offline
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

        def unreachable(*args, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
        done = script("evaluate_samples.py", samples, real)
        assert done.code == 2
        assert "--features ddpm" in done.err
        assert "inception_v3" in done.err

    def test_what_cannot_be_is_refused(self, script, offline, tmp_path):
        samples, real, flags = offline
        done = script("evaluate_samples.py", samples, real, *flags, "--nearest_k", 10)
        assert done.code == 2
        assert "from 1 to 9" in done.err
        done = script("evaluate_samples.py", samples, tmp_path / "nowhere", *flags)
        assert done.code == 2
        done = script("evaluate_samples.py", samples, real, "--features", "ddpm")
        assert "--model_path is missing" in done.err
        coloured = dataclasses.replace(NETWORK, in_channels=3)
        model = write_trained(tmp_path / "coloured", coloured)
        done = script(
            "evaluate_samples.py", samples, real, "--features", "ddpm", "--model_path", model
        )
        assert "of 1 channels" in done.err
        conditional = dataclasses.replace(NETWORK, class_cond=True, num_classes=2)
        model = write_trained(tmp_path / "conditional", conditional, classes=CLASSES)
        done = script(
            "evaluate_samples.py", samples, real, "--features", "ddpm", "--model_path", model
        )
        assert "cannot run without a class" in done.err


def test_samples_must_be_of_one_size(tmp_path):
    write_shapes(tmp_path, count=2)
    assert load_samples(str(tmp_path)).images.shape == (2, 16, 16, 1)
    Image.new("RGB", (4, 4)).save(tmp_path / "zoo_1.png")
    with pytest.raises(ValueError, match="samples must be of one size"):
        load_samples(str(tmp_path))
