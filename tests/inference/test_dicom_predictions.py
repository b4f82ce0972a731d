"""What a prediction says of DICOM files, and to whom."""

from pathlib import Path

import pytest
from dicom_files import write_dicom
from head_runs import levels_of, write_run

from sam3cache.features import FeatureStore
from sam3cache.images import read_image
from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE
from sam3cache.inference import PredictConfig, predict_images
from sam3cache.records import Sample


def test_where_the_key_is_stands_on_the_screen_and_in_no_file(
    store: FeatureStore, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "Zwartebroek.key"
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(key_file))
    run = write_run(levels_of(store), tmp_path / "run", "linear")
    first = store.samples[0]
    pixels = read_image(Sample(first.id, first.source, pictures))
    path = write_dicom(tmp_path / "a.dcm", pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    output = tmp_path / "out"
    made = predict_images(
        PredictConfig(run, (path,), output, store=store.path, coco=output / "coco.json")
    )
    assert made.num_from_store == 1
    assert any(str(key_file) in note for note in made.notes)
    written = [file.read_bytes() for file in output.rglob("*") if file.is_file()]
    assert len(written) >= 4
    assert not any(b"Zwartebroek" in data for data in written)
