"""Import paths of version 0.1 still lead to the same objects."""

import importlib

import pytest

from guided_diffusion.runtime.moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_moved_modules_import_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match="has moved to guided_diffusion"):
        module = importlib.reload(importlib.import_module(f"guided_diffusion.{name}"))
    for place in MOVED[name]:
        target = importlib.import_module(f"guided_diffusion.{place}")
        public = [one for one, value in vars(target).items() if callable(value)]
        assert any(getattr(module, one) is getattr(target, one) for one in public)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_are_those_of_the_new_place():
    from guided_diffusion.errors import UserError as old_error
    from guided_diffusion.image_io import pair_files, read_image

    from guided_diffusion.images import files, image_io
    from guided_diffusion.runtime.errors import UserError

    assert (old_error, pair_files, read_image) == (UserError, files.pair_files, image_io.read_image)
    with pytest.raises(ImportError, match="nonsense"):
        from guided_diffusion.image_io import nonsense  # noqa: F401
