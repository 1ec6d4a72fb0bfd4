"""Installing with and without a compiler, and what a source distribution holds."""

import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from types import SimpleNamespace

import pytest
from paths import ROOT

from guided_diffusion.kernels import library

KERNELS = ROOT / "guided_diffusion" / "kernels"


@pytest.fixture
def source(tmp_path):
    """A copy of what is installed, without anything that has been built."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "guided_diffusion", folder / "guided_diffusion", ignore=ignored)
    return folder


def setup(source, *arguments, **env) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", *map(str, arguments)],
        cwd=source,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_without_a_compiler_all_but_the_kernels_is_installed(source, tmp_path):
    missing = str(tmp_path / "no compiler")
    setup(source, "build", "--build-lib", tmp_path / "lib", CC=missing, LDSHARED=missing)
    installed = tmp_path / "lib" / "guided_diffusion"
    assert (installed / "kernels" / "library.py").exists()
    assert (installed / "segmentation" / "categories.json").exists()
    assert not list(installed.rglob("*.so"))


def test_a_source_distribution_holds_all_that_is_compiled(source, tmp_path):
    setup(source, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {os.path.basename(name) for name in files.getnames() if "/kernels/" in name}
    wanted = {path.name for path in KERNELS.iterdir() if path.suffix in (".c", ".h", ".py")}
    assert wanted <= found
    listed = (source / "MANIFEST.in").read_text().split()
    assert "guided_diffusion/kernels/*.h" in listed  # setuptools below 69 does not see to it


def test_a_library_of_other_sources_is_not_used():
    sources = b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.[ch]")))
    checksum = zlib.crc32(sources)
    assert library._is_current(SimpleNamespace(sources_checksum=lambda: checksum))
    for other in (SimpleNamespace(sources_checksum=lambda: checksum ^ 1), SimpleNamespace()):
        with pytest.warns(UserWarning, match="older than their sources"):
            assert not library._is_current(other)
