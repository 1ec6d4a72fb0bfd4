import json

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.images.image_io import bit_depth, read_image
from guided_diffusion.images.masks import read_mask
from guided_diffusion.segmentation.categories import load_categories


def test_analyze(prepare, phantoms, tmp_path):
    code, out, _ = prepare(
        "--action", "analyze", "--source-dir", phantoms, "--output-dir", tmp_path / "report"
    )
    assert code == 0
    report = json.loads((tmp_path / "report/analysis.json").read_text())
    assert report["images"] == 36
    assert report["splits"] == {"TRAIN": 30, "VAL": 6}
    assert report["sizes"] == {"72x72": 36}
    assert report["bits"] == {"8": 36}
    assert report["grey_images"] == 36
    masks = np.stack([read_mask(str(p)) for p in sorted(phantoms.rglob("MASK/*.png"))])
    for category in load_categories():
        entry = report["classes"][category.name]
        assert entry["share"] == pytest.approx((masks == category.index).mean())
        assert entry["images"] == (masks == category.index).any(axis=(1, 2)).sum()
    films = np.stack([read_image(str(p)) for p in sorted(phantoms.rglob("IMG/*.png"))]) / 255
    means = films.mean(axis=(1, 2))
    assert report["grey_levels"]["mean"][::2] == pytest.approx(
        [means.min(), np.median(means), means.max()], abs=1e-5
    )
    advice = {line["flag"]: line["value"] for line in report["recommended"]}
    assert advice["--resize"] == "crop"
    assert advice["--in_channels"] == "1"
    assert all(line["why"] for line in report["recommended"])
    assert "caries" in out
    with Image.open(tmp_path / "report/analysis.png") as picture:
        assert picture.width > 500


def test_analyze_deep_wide_and_coloured_images(prepare, tmp_path):
    rng = np.random.default_rng(0)
    ramp = np.linspace(100, 4000, 40 * 80).reshape(40, 80).astype(np.uint16)
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(ramp + np.uint16(number)).save(folder / f"deep{number}.png")
    colour = rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "colour.jpg")
    (folder / "broken.png").write_bytes(b"no")
    code, out, _ = prepare("--action", "analyze", "--image-dir", folder, "--output-dir", tmp_path)
    assert code == 0
    assert "1 unreadable" in out
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert report["bits"] == {"8": 1, "16": 3}
    advice = {line["flag"]: line["value"] for line in report["recommended"]}
    assert advice["--intensity"] == "percentile"  # 12 of 16 bits are used
    assert advice["--resize"] == "pad"
    assert advice["--in_channels"] == "3"
    assert "classes" not in report
    assert bit_depth(str(folder / "deep0.png")) == 16
