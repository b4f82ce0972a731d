"""DICOM files as pydicom writes them, in every transfer syntax that can be written here."""

import io
import json
import os
import shutil
import sys
import tracemalloc
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from damage import forget_peak, peak_bytes
from dicom_files import (
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    LOSSLESS,
    LOSSY,
    RLE,
    angiogram,
    write_dicom,
)
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import SecondaryCaptureImageStorage

from sam3cache.errors import ConfigError, ImageError, ManifestError
from sam3cache.images import dicom, parse_classes, probe, read_image, read_manifest, read_mask
from sam3cache.images.contrast import contrast_frame
from sam3cache.images.files import open_picture
from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE, load_key, pseudonym
from sam3cache.records import Sample

EXAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.fixture(autouse=True)
def key_file(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("key") / "names.key"
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(path))
    return path


def read(path, frame=None, **kwargs):
    with open_picture(path, path.name, frame=frame, **kwargs) as picture:
        pixels = picture.read(frame or 0)
        assert pixels.shape == (picture.height_px, picture.width_px, picture.num_channels)
    return pixels


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, DEFLATED, "1.2.840.10008.1.2.2", RLE])
def test_an_uncompressed_or_run_length_cine_gives_its_exact_frames(tmp_path, syntax, bits):
    cine = angiogram(3, 40, bits, fullest=1)
    path = write_dicom(tmp_path / "a.dcm", cine, bits=bits, syntax=syntax)
    for frame in (2, 0):
        assert np.array_equal(read(path, frame)[..., 0], cine[frame])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_a_losslessly_compressed_cine_gives_its_exact_frames(tmp_path, syntax, bits):
    cine = angiogram(3, 40, bits, fullest=1)
    path = write_dicom(tmp_path / "a.dcm", cine, bits=bits, syntax=syntax)
    for frame in (2, 0):
        assert np.array_equal(read(path, frame)[..., 0], cine[frame])


@pytest.mark.parametrize(
    ("syntax", "bits"), [(syntax, 12 if syntax.endswith(".51") else 8) for syntax in LOSSY]
)
def test_a_lossily_compressed_frame_is_near(tmp_path, syntax, bits):
    cine = angiogram(2, 64, bits)
    pixels = read(write_dicom(tmp_path / "a.dcm", cine, bits=bits, syntax=syntax), 1)
    assert np.abs(pixels[..., 0].astype(float) - cine[1]).mean() < 2**bits / 64


@pytest.mark.parametrize(
    ("photometric", "most"), [("MONOCHROME2", 1), ("YBR_FULL_422", 4), ("YBR_FULL", 4)]
)
def test_a_jpeg_is_decoded_as_by_another_decoder(tmp_path, photometric, most):
    ground = angiogram(2, 64, 8)
    pixels = ground[0]
    if photometric != "MONOCHROME2":
        pixels = np.stack([ground[0], ground[1][::-1], ground[0].T], -1)
    path = tmp_path / "a.dcm"
    write_dicom(
        path, pixels, syntax="1.2.840.10008.1.2.4.50", PhotometricInterpretation=photometric
    )
    jpeg = io.BytesIO()
    subsampling = "4:2:2" if photometric.endswith("422") else "4:4:4"
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=90, subsampling=subsampling)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([jpeg.getvalue()])
    dataset.save_as(path)
    expected = np.asarray(Image.open(jpeg)).reshape(read(path).shape).astype(int)
    assert np.abs(read(path) - expected).max() <= most


@pytest.mark.parametrize("side_px", [512, 1016, 1024])
def test_a_frame_of_a_real_machines_size_is_read_alone(tmp_path, side_px):
    cine = np.zeros((3, side_px, side_px), np.uint8)
    cine[2] = np.arange(side_px, dtype=np.uint16).astype(np.uint8)
    path = write_dicom(tmp_path / "a.dcm", cine)
    assert np.array_equal(read(path, 2)[..., 0], cine[2])


@pytest.mark.parametrize("syntax", [EXPLICIT, RLE, "1.2.840.10008.1.2.4.80"])
def test_colours_come_out_as_they_were(tmp_path, syntax):
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(read(write_dicom(tmp_path / "a", colours, syntax=syntax)), colours)


def test_luminance_and_differences_become_red_green_and_blue(tmp_path):
    ybr = np.full((4, 4, 3), 128, np.uint8)
    ybr[..., 0] = 76
    ybr[..., 1:] = 85, 255  # Pure red, by ITU-R BT.601.
    path = write_dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    assert np.abs(read(path).astype(int) - [254, 0, 0]).max() <= 2


def test_a_palette_is_looked_up(tmp_path):
    table = np.arange(256, dtype=np.uint16) * 257
    colours = {"Red": table, "Green": table[::-1], "Blue": table * 0}
    tags = {}
    for colour, values in colours.items():
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = values.astype("<u2").tobytes()
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    path = write_dicom(
        tmp_path / "a.dcm", indices, PhotometricInterpretation="PALETTE COLOR", **tags
    )
    assert np.array_equal(read(path)[..., 0], indices)
    assert np.array_equal(read(path)[..., 1], 255 - indices)


@pytest.mark.parametrize("bits", [8, 12])
def test_where_low_is_white_black_and_white_change_places(tmp_path, bits):
    frame = angiogram(1, 32, bits)[0]
    path = write_dicom(
        tmp_path / "a.dcm", frame, bits=bits, PhotometricInterpretation="MONOCHROME1"
    )
    assert np.array_equal(read(path)[..., 0], 2**bits - 1 - frame.astype(int))


def image(path, frame=None):
    return read_image(Sample("a", path.name, path.parent, frame=frame))[..., 0]


def linear(values, centre, width):
    """PS3.3, C.11.2.1.2.1, for output from 0 to 255."""
    shown = ((values.astype(float) - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(shown.clip(0, 255))


def test_the_files_own_window_is_used_beyond_8_bits(tmp_path):
    frame = angiogram(1, 32, 12)[0]
    tags = {"WindowCenter": 2000, "WindowWidth": 1500}
    path = write_dicom(tmp_path / "a.dcm", frame, bits=12, **tags)
    assert np.array_equal(image(path), linear(frame, 2000, 1500))
    inverse = write_dicom(
        tmp_path / "b.dcm", frame, bits=12, PhotometricInterpretation="MONOCHROME1", **tags
    )
    assert np.array_equal(image(inverse), 255 - linear(frame, 2000, 1500))


def test_a_window_is_in_the_units_of_the_rescaled_values(tmp_path):
    frame = angiogram(1, 32, 12)[0]
    path = write_dicom(
        tmp_path / "a.dcm",
        frame,
        bits=12,
        RescaleSlope=-2,
        RescaleIntercept=100,
        WindowCenter=[-3000, 5],
        WindowWidth=[2000, 6],
    )
    assert np.array_equal(image(path), linear(100.0 - 2.0 * frame, -3000, 2000))


def test_a_sigmoid_and_a_table_are_followed(tmp_path):
    frame = angiogram(1, 32, 12)[0]
    path = write_dicom(
        tmp_path / "a.dcm",
        frame,
        bits=12,
        WindowCenter=2000,
        WindowWidth=800,
        VOILUTFunction="SIGMOID",
    )
    expected = np.rint(255 / (1 + np.exp(-4 * (frame.astype(float) - 2000) / 800)))
    assert np.array_equal(image(path), expected)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 8], [255 - i // 16 for i in range(4096)]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    path = write_dicom(tmp_path / "b.dcm", frame, bits=12, VOILUTSequence=[item])
    assert np.array_equal(image(path), 255 - frame // 16)


def test_without_a_window_the_frames_of_a_cine_share_the_files_percentiles(tmp_path):
    cine = angiogram(4, 32, 12, fullest=2)
    np.save(tmp_path / "a.npy", cine)
    path = write_dicom(tmp_path / "a.dcm", cine, bits=12)
    expected = read_image(Sample("a", "a.npy", tmp_path, frame=2))[..., 0]
    assert np.array_equal(image(path, 2), expected)
    contrast = read_image(Sample("a", "a.dcm::contrast", tmp_path))[..., 0]
    assert np.array_equal(contrast, expected)


def test_8_bits_stay_as_they_are_whatever_window_there_is(tmp_path):
    frame = angiogram(1, 32, 8)[0]
    path = write_dicom(tmp_path / "a.dcm", frame, WindowCenter=10, WindowWidth=5)
    assert np.array_equal(image(path), frame)
    wide = write_dicom(tmp_path / "b.dcm", frame.astype(np.uint16), bits=8)
    assert np.array_equal(image(wide), frame)


@pytest.mark.parametrize("fullest", [0, 3, 5])
def test_the_frame_with_the_most_contrast_agent_is_found(fullest):
    cine = angiogram(6, 300, 8, fullest=fullest)
    assert contrast_frame(frame[..., None] for frame in cine) == fullest
    brightened = (cine.astype(int) + np.arange(6)[:, None, None] * 3).clip(0, 255)
    assert contrast_frame(frame[..., None] for frame in brightened) == fullest


def test_of_frames_alike_the_first_has_the_most_contrast_agent():
    assert contrast_frame(np.zeros((3, 8, 8, 1), np.uint8)) == 0


def write_study(folder):
    """Two patients: a still, two cines, and what does not belong."""
    inner = folder / "DOE_JOHN_19570203"
    inner.mkdir(parents=True)
    tags = {"PatientName": "Doe^John", "PatientID": "MRN-77", "PatientBirthDate": "19570203"}
    view = {"PositionerPrimaryAngle": "30.5", "PositionerSecondaryAngle": "-20"}
    size = {"ImagerPixelSpacing": [0.3, 0.3], "EstimatedRadiographicMagnificationFactor": "1.5"}
    write_dicom(inner / "IM1", angiogram(3, 48, 8, fullest=2), **tags, **view, **size)
    write_dicom(inner / "JOHN.dcm", angiogram(1, 48, 12)[0], bits=12, **tags)
    write_dicom(folder / "1.2.3", angiogram(2, 48, 8), PatientID="MRN-78", StudyInstanceUID="1.9")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "readme.txt").write_text("not a picture", encoding="utf-8")
    report = pydicom.dcmread(EXAMPLES / "reportsi.dcm")
    report.save_as(folder / "report.dcm")
    return folder


def test_a_folder_gives_its_pictures_with_views_spacing_and_patients(tmp_path):
    manifest = read_manifest(write_study(tmp_path / "study"))
    other, cine, still = manifest.samples
    assert cine.image_path == tmp_path / "study" / "DOE_JOHN_19570203" / "IM1"
    assert (cine.primary_angle_deg, cine.secondary_angle_deg) == (30.5, -20.0)
    assert cine.extra["spacing_mm"] == "0.2\\0.2"
    assert "magnification" in cine.extra["spacing_from"]
    assert cine.frame is None
    assert cine.image_member == "contrast"
    assert np.array_equal(read_image(cine)[..., 0], angiogram(3, 48, 8, fullest=2)[2])
    assert still.image_member == ""
    assert still.group == cine.group != other.group
    assert still.primary_angle_deg is None
    assert "spacing_mm" not in still.extra
    told = " ".join(manifest.notes)
    assert "2 files that are not DICOM" in told
    assert "1 DICOM files without a picture" in told
    assert [probe(sample).height_px for sample in manifest.samples] == [48, 48, 48]


def test_of_a_folder_only_x_ray_angiography_is_taken_and_the_rest_by_name(tmp_path):
    frame = angiogram(1, 32, 8)[0]
    capture = {"SOPClassUID": SecondaryCaptureImageStorage}
    kinds = {
        "angiogram": {},
        "fluoroscopy": {"Modality": "RF", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.2"},
        "nothing said": {"Modality": None, "SOPClassUID": None},
        "class alone": {"Modality": "OT"},
        "dose report": {"Modality": "SC", "BurnedInAnnotation": "YES", **capture},
        "screen of an angiography": {"Modality": "XA", **capture},
        "capture of frames": {"Modality": "XA", "SOPClassUID": f"{SecondaryCaptureImageStorage}.2"},
        "tomogram": {"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"},
    }
    for name, tags in kinds.items():
        write_dicom(tmp_path / f"{name}.dcm", frame, **tags)
        if tags.get("Modality", "") is None:
            dataset = pydicom.dcmread(tmp_path / f"{name}.dcm")
            del dataset.Modality, dataset.SOPClassUID
            dataset.save_as(tmp_path / f"{name}.dcm")
    write_dicom(tmp_path / "named.dcm", frame, BurnedInAnnotation="YES")
    manifest = read_manifest(tmp_path)
    assert sorted(sample.image_path.stem for sample in manifest.samples) == [
        "angiogram",
        "class alone",
        "fluoroscopy",
        "named",
        "nothing said",
    ]
    told = [note for note in manifest.notes if "left out" in note]
    assert [note[:44] for note in told] == ["4 DICOM files that are no X-ray angiography "]
    assert "name them in a CSV" in told[0]
    assert sum(note.startswith("1 DICOM files say that text") for note in manifest.notes) == 1
    alone = read_manifest(tmp_path / "dose report.dcm")
    assert np.array_equal(read_image(alone.samples[0])[..., 0], frame)
    assert any(note.startswith("1 DICOM files say that text") for note in alone.notes)
    (tmp_path / "m.csv").write_text("image\ntomogram.dcm\n", encoding="utf-8")
    assert len(read_manifest(tmp_path / "m.csv").samples) == 1


def test_a_folder_without_an_angiogram_says_what_it_has(tmp_path):
    write_dicom(
        tmp_path / "a.dcm",
        angiogram(1, 16, 8)[0],
        Modality="CT",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
    )
    shutil.copy(EXAMPLES / "reportsi.dcm", tmp_path)
    with pytest.raises(ManifestError, match=r"1 DICOM files without a picture .* 1 DICOM files"):
        read_manifest(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes among its files")
@pytest.mark.timeout(60)
def test_a_pipe_is_no_dicom_file_and_nothing_waits_for_it(tmp_path):
    write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0])
    for name in ("b", "c.dcm"):
        os.mkfifo(tmp_path / name)
    assert not dicom.is_dicom(tmp_path / "b")
    manifest = read_manifest(tmp_path)
    assert [sample.image_path.name for sample in manifest.samples] == ["a.dcm"]
    (aside,) = manifest.set_aside
    assert "is no file but a pipe" in aside.reason
    (tmp_path / "m.csv").write_text("image\na.dcm\nb\nc.dcm\n", encoding="utf-8")
    manifest = read_manifest(tmp_path / "m.csv")
    assert "is no file but a pipe" in manifest.set_aside[0].reason
    with pytest.raises(ImageError, match="is no file but a pipe"):
        probe(manifest.samples[1])


def test_a_csv_may_name_dicoms_and_say_more_than_their_headers(tmp_path):
    write_study(tmp_path / "study")
    lines = [
        "image,frame,primary_angle,patient_note",
        "study/DOE_JOHN_19570203/IM1,1,-12,John",
        "study/DOE_JOHN_19570203/IM1,contrast,,John",
        "study/DOE_JOHN_19570203/gone.dcm,,,",
        "study/DOE_JOHN_19570203/IM1,7,,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(lines), encoding="utf-8")
    manifest = read_manifest(tmp_path / "m.csv")
    first, second, beyond = manifest.samples
    assert (first.frame, first.primary_angle_deg, first.secondary_angle_deg) == (1, -12.0, -20.0)
    assert second.primary_angle_deg is None  # An empty cell is unknown, whatever the header says.
    assert (first.source, second.source) == (first.source, first.source + "::contrast")
    assert first.group == second.group
    (gone,) = manifest.set_aside
    assert gone.reason.startswith("line 4: ")
    assert "No such file" in gone.reason
    with pytest.raises(ImageError, match=r"line 5: \w+\.dcm: no frame 7; it has 0 to 2"):
        probe(beyond)
    assert "DOE" not in repr([(s.id, s.source, s.group, s.extra) for s in manifest.samples])


def test_an_angle_out_of_range_is_told_as_the_headers_and_a_column_goes_before_it(tmp_path):
    tags = {"PositionerPrimaryAngle": "400", "PositionerSecondaryAngle": "10"}
    for name in "ab":
        write_dicom(tmp_path / f"{name}.dcm", angiogram(1, 16, 8)[0], **tags)
    (tmp_path / "m.csv").write_text("image\na.dcm\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"400 of the file's header is outside .* a CSV's col"):
        read_manifest(tmp_path / "m.csv")
    text = "image,primary_angle\na.dcm,30\nb.dcm,\n"
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    assert [s.primary_angle_deg for s in read_manifest(tmp_path / "m.csv").samples] == [30, None]


def test_a_columns_file_may_say_which_frame_and_that_names_may_be_kept(tmp_path):
    write_study(tmp_path / "study")
    (tmp_path / "c.toml").write_text(
        'frame = { constant = "0" }\nhash_paths = false\nreader = "dicom"\n', encoding="utf-8"
    )
    manifest = read_manifest(tmp_path / "study", tmp_path / "c.toml")
    assert manifest.samples[1].source == "DOE_JOHN_19570203/IM1"
    assert manifest.samples[1].frame == 0


def views(path):
    """Angles of frames 0 and 1, and of the one with the most contrast agent."""
    csv = path.with_suffix(".csv")
    rows = [f"{path.name},{frame}\n" for frame in (0, 1, "contrast")]
    csv.write_text("image,frame\n" + "".join(rows), encoding="utf-8")
    return [(s.primary_angle_deg, s.secondary_angle_deg) for s in read_manifest(csv).samples]


ROTATIONS = {
    "a value a frame": ({"PositionerPrimaryAngleIncrement": [0, 60, 120]}, (-30, 10)),
    "absolute values": (
        {"PositionerPrimaryAngle": "0", "PositionerPrimaryAngleIncrement": [-90, -30, 30]},
        (-30, 10),
    ),
    "one value": ({"PositionerPrimaryAngleIncrement": "1.5"}, (-88.5, 10)),
    "beyond half a turn": ({"PositionerPrimaryAngleIncrement": [0, 300, 301]}, (-150, 10)),
    "nothing": ({}, (None, 10)),
    "another number of values": ({"PositionerPrimaryAngleIncrement": [0, 60]}, (None, 10)),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_angles_of_a_rotational_run_are_those_of_the_frame_or_unknown(tmp_path, case):
    tags, second = ROTATIONS[case]
    tags = {
        "PositionerMotion": "DYNAMIC",
        "PositionerPrimaryAngle": "-90",
        "PositionerSecondaryAngle": "10",
        "PositionerSecondaryAngleIncrement": [0, 0, 0],
    } | tags
    path = write_dicom(tmp_path / "a.dcm", angiogram(3, 16, 8), **tags)
    assert views(path) == [(-90, 10), second, (None, 10)]
    write_dicom(path, angiogram(3, 16, 8), **(tags | {"PositionerMotion": "STATIC"}))
    assert len(set(views(path))) == 1


def test_a_header_that_claims_frames_without_end_costs_nothing(tmp_path):
    path = write_dicom(
        tmp_path / "a.dcm",
        angiogram(3, 16, 8),
        NumberOfFrames=2**31 - 1,
        PositionerMotion="DYNAMIC",
        PositionerPrimaryAngle="-90",
        PositionerPrimaryAngleIncrement="1.5",
    )
    forget_peak()
    before_bytes = peak_bytes()
    assert views(path) == [(-90, None), (-88.5, None), (None, None)]
    assert peak_bytes() - before_bytes < 100_000_000
    with pytest.raises(ImageError, match="damaged"):
        image(path, 3)


def test_a_deflated_file_is_inflated_once_for_who_reads_it_and_given_back(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.ones((5, 1000, 1000), np.uint8), syntax=DEFLATED)
    read(path, 1)
    tracemalloc.start()
    try:
        with open_picture(path, "a.dcm", frame=0) as first, open_picture(path, "a.dcm", frame=0):
            first.read(4)
            _, peak = tracemalloc.get_traced_memory()
        del first
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # While it is inflated, blocks and what is made of them lie side by side.
    assert peak < 14_000_000
    assert kept < 1_000_000


def test_a_patient_with_an_issuer_here_and_without_there_is_told(tmp_path):
    for name, issuer in (("a", None), ("b", "HOSPITAL"), ("c", "HOSPITAL")):
        patient_id = "8" if name == "c" else "7"
        tags = {"PatientID": patient_id, "IssuerOfPatientID": issuer}
        write_dicom(tmp_path / f"{name}.dcm", angiogram(1, 16, 8)[0], **tags)
    manifest = read_manifest(tmp_path)
    assert len({s.group for s in manifest.samples}) == 3
    assert any(note.startswith("1 patient IDs stand in some") for note in manifest.notes)
    (tmp_path / "a.dcm").unlink()
    assert not any("issuer" in note for note in read_manifest(tmp_path).notes)


def modality_table(first, last, bits):
    item = Dataset()
    item.LUTDescriptor = [256, 0, bits]
    item.LUTData = np.linspace(first, last, 256).astype(int).tolist()
    item.ModalityLUTType = "US"
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return item


def test_a_modality_table_is_not_for_the_display_of_x_rays(tmp_path):
    frame = angiogram(1, 32, 8)[0]
    tags = {"ModalityLUTSequence": [modality_table(65535, 0, 16)]}
    for modality in ("XA", "RF"):
        path = write_dicom(tmp_path / f"{modality}.dcm", frame, Modality=modality, **tags)
        assert np.array_equal(image(path), frame)
    frame = angiogram(1, 32, 12)[0]
    window = {"WindowCenter": 2000, "WindowWidth": 1500}
    path = write_dicom(tmp_path / "a.dcm", frame, bits=12, **tags, **window)
    assert np.array_equal(image(path), linear(frame, 2000, 1500))


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_what_a_modality_table_gives_keeps_its_bits(tmp_path, photometric):
    frame = np.arange(256, dtype=np.uint8).reshape(16, 16)
    item = modality_table(0, 65535, 16)
    path = write_dicom(
        tmp_path / "a.dcm",
        frame,
        Modality="CR",
        PhotometricInterpretation=photometric,
        ModalityLUTSequence=[item],
    )
    expected = frame.astype(int) * 257
    pixels = read(path)[..., 0]
    assert np.array_equal(pixels, expected if photometric[-1] == "2" else 65535 - expected)


def test_angles_of_an_enhanced_header_are_those_of_the_frame(tmp_path):
    def group(degrees):
        position, item = Dataset(), Dataset()
        position.PositionerPrimaryAngle, position.PositionerSecondaryAngle = degrees, -degrees
        item.PositionerPositionSequence = [position]
        return item

    path = write_dicom(
        tmp_path / "a.dcm",
        angiogram(2, 32, 8),
        PerFrameFunctionalGroupsSequence=[group(20), group(25)],
    )
    assert views(path) == [(20, -20), (25, -25), (None, None)]
    still = [group(20), group(20.5)]
    write_dicom(path, angiogram(2, 32, 8), PerFrameFunctionalGroupsSequence=still)
    assert views(path) == [(20, -20)] * 3


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"PixelSpacing": [0.21, 0.22], "ImagerPixelSpacing": [0.3, 0.3]}, "0.21\\0.22"),
        (
            {
                "ImagerPixelSpacing": [0.3, 0.3],
                "DistanceSourceToDetector": "1000",
                "DistanceSourceToPatient": "750",
            },
            "0.225\\0.225",
        ),
        ({"ImagerPixelSpacing": [0.3, 0.3]}, ""),
        ({"PixelSpacing": [0.3, 0.3]}, "0.3\\0.3"),
        ({"PixelSpacing": [0.3, 0.3], "ImagerPixelSpacing": [0.3, 0.3]}, ""),
        (
            {
                "PixelSpacing": [0.3, 0.3],
                "ImagerPixelSpacing": [0.3, 0.3],
                "EstimatedRadiographicMagnificationFactor": "1.5",
            },
            "0.2\\0.2",
        ),
        (
            {
                "PixelSpacing": [0.3, 0.3],
                "ImagerPixelSpacing": [0.3, 0.3],
                "PixelSpacingCalibrationType": "GEOMETRY",
            },
            "0.3\\0.3",
        ),
        ({"ImagerPixelSpacing": [0, 0], "EstimatedRadiographicMagnificationFactor": "1.5"}, ""),
    ],
)
def test_spacing_is_that_of_the_patients_plane_or_unknown(tmp_path, tags, spacing):
    path = write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0], **tags)
    (sample,) = read_manifest(path).samples
    assert sample.extra.get("spacing_mm", "") == spacing


def test_names_depend_on_the_users_key(tmp_path, key_file, monkeypatch):
    study = write_study(tmp_path / "study")
    first = read_manifest(study)
    assert any(str(key_file) in note for note in first.notes)
    again = read_manifest(study)
    assert not any("key" in note for note in again.notes)
    assert [s.source for s in again.samples] == [s.source for s in first.samples]
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "other.key"))
    other = read_manifest(study)
    assert other.key_mark != first.key_mark == again.key_mark
    assert not {s.group for s in other.samples} & {s.group for s in first.samples}


def test_a_key_that_is_none_is_told_in_one_line(tmp_path, key_file, monkeypatch):
    monkeypatch.setattr("sam3cache.images.pseudonyms._PATIENCE_S", 0.0)
    key_file.write_text("not hex", encoding="utf-8")
    with pytest.raises(ManifestError, match="does not hold 32 bytes"):
        read_manifest(write_study(tmp_path / "study"))


def bomb(path):
    frame = np.zeros((2000, 2000), np.uint8)
    write_dicom(path, np.zeros((8, 8), np.uint8), syntax="1.2.840.10008.1.2.4.90")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([imagecodecs.jpeg2k_encode(frame, codecformat="j2k")])
    dataset.save_as(path)


def header_bomb(path):
    write_dicom(path, np.zeros((8, 8), np.uint8), Rows=65535, Columns=65535)


def deflate_bomb(path):
    write_dicom(path, np.zeros((4096, 4096), np.uint8), syntax=DEFLATED)


def half(path):
    write_dicom(path, angiogram(1, 64, 8)[0])
    path.write_bytes(path.read_bytes()[:-3000])


def unknown_syntax(path):
    write_dicom(path, angiogram(1, 8, 8)[0])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"))


BAD = {
    "a smaller frame than the codestream's": (bomb, "damaged"),
    "a header of 4 billion pixels": (header_bomb, "65535 x 65535 pixels"),
    "more than may be inflated": (deflate_bomb, "deflated"),
    "half of the pixels": (half, "damaged"),
    "an unknown transfer syntax": (unknown_syntax, "transfer syntax"),
    "a report": (lambda path: shutil.copy(EXAMPLES / "reportsi.dcm", path), "without a picture"),
    "a preamble alone": (lambda path: path.write_bytes(b"\0" * 128 + b"DICM"), "transfer syntax"),
    "text": (lambda path: path.write_text("Doe, John" * 20, encoding="utf-8"), "not an image"),
    "video": (
        lambda path: write_dicom(path, angiogram(1, 8, 8)[0], syntax="1.2.840.10008.1.2.4.102"),
        "not read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_in_one_line_without_its_path(tmp_path, monkeypatch, capfd, case):
    monkeypatch.setattr(dicom, "MAX_INFLATED_BYTES", 1 << 20)
    write, words = BAD[case]
    path = tmp_path / "DOE_JOHN"
    write(path)
    with pytest.raises(ImageError) as caught, open_picture(path, "a.dcm") as picture:
        picture.read(0)
    message = str(caught.value)
    assert message.startswith("a.dcm: ")
    assert words in message
    assert "DOE" not in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


# Shipped with pydicom, from scanners and other writers than itself.
REAL = {
    "JPEG-lossy.dcm": (1024, 256, 1),
    "JPEG2000.dcm": (1024, 256, 1),
    "MR_small.dcm": (64, 64, 1),
    "MR_small_RLE.dcm": (64, 64, 1),
    "MR_small_bigendian.dcm": (64, 64, 1),
    "SC_rgb_jpeg_gdcm.dcm": (100, 100, 3),
    "SC_rgb_rle_2frame.dcm": (100, 100, 3),
    "examples_palette.dcm": (350, 800, 3),
    "image_dfl.dcm": (512, 512, 1),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_is_read(name):
    pixels = read(EXAMPLES / name, 1 if "2frame" in name else None)
    assert pixels.shape == REAL[name]
    assert pixels.std() > 0


EXACT = ("MR_small.dcm", "MR_small_RLE.dcm", "image_dfl.dcm", "SC_rgb_rle_2frame.dcm")


@pytest.mark.parametrize("name", [name for name in REAL if name != "examples_palette.dcm"])
def test_a_real_files_values_are_those_of_pydicom(name):
    frame = 1 if "2frame" in name else 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = pixel_array(pydicom.dcmread(EXAMPLES / name), index=frame)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"pydicom cannot decode it here: {type(error).__name__}")
    pixels = read(EXAMPLES / name, frame).astype(float).reshape(expected.shape)
    assert np.abs(pixels - expected).max() <= (0 if name in EXACT else 2)


def test_a_mask_beside_a_dicom_belongs_to_whichever_frame(tmp_path):
    write_dicom(tmp_path / "a.dcm", angiogram(3, 32, 8))
    np.save(tmp_path / "m.npy", np.eye(32, dtype=bool))
    (tmp_path / "m.csv").write_text("image,mask,frame\na.dcm,m.npy,contrast\n", encoding="utf-8")
    (sample,) = read_manifest(tmp_path / "m.csv").samples
    assert read_mask(sample).sum() == 32
    assert sample.mask.endswith(".npy")


def test_what_is_called_dicom_and_is_none_is_not_quoted(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"Doe^John\0" * 30)
    with pytest.raises(ManifestError, match="not a DICOM file") as caught:
        read_manifest(tmp_path / "a.dcm")
    assert "Doe" not in str(caught.value)
    (tmp_path / "a").write_bytes(b"Doe^John\0" * 30)
    with pytest.raises(ManifestError, match="neither a table") as caught:
        read_manifest(tmp_path / "a")
    assert "Doe" not in str(caught.value)


def test_of_a_folder_with_pictures_as_well_the_user_says_which(tmp_path):
    folder = write_study(tmp_path / "study")
    np.save(folder / "a.npy", np.zeros((8, 8), np.uint8))
    with pytest.raises(ManifestError, match='reader = "dicom"'):
        read_manifest(folder)
    for reader, num_samples in (("dicom", 3), ("folder", 1)):
        (tmp_path / "c.toml").write_text(f'reader = "{reader}"', encoding="utf-8")
        assert len(read_manifest(folder, tmp_path / "c.toml").samples) == num_samples
    (tmp_path / "c.toml").write_text('reader = "dcm"', encoding="utf-8")
    with pytest.raises(ManifestError, match="expected one of csv, parquet"):
        read_manifest(folder, tmp_path / "c.toml")


def test_a_json_for_angles_is_hidden_like_the_dicom_it_belongs_to(tmp_path):
    write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0])
    (tmp_path / "DOE.json").write_text(json.dumps({}), encoding="utf-8")
    (tmp_path / "m.csv").write_text("image,info\na.dcm,DOE.json\n", encoding="utf-8")
    (tmp_path / "c.toml").write_text(
        'primary_angle = { json = "info", key = "lao" }', encoding="utf-8"
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "m.csv", tmp_path / "c.toml")
    assert "DOE" not in str(caught.value)


def test_one_patient_is_one_group_whatever_its_files_are(tmp_path, key_file):
    write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0])
    for name in ("b.npy", "c.npy"):
        np.save(tmp_path / name, np.zeros((8, 8), np.uint8))
    lines = ["image,patient_id,group", "b.npy,P1,DOE", "a.dcm,P1,DOE", "c.npy,P2,ROE"]
    (tmp_path / "m.csv").write_text("\n".join(lines), encoding="utf-8")
    for column in ("patient_id", "group"):
        (tmp_path / "c.toml").write_text(f'group = "{column}"', encoding="utf-8")
        manifest = read_manifest(tmp_path / "m.csv", tmp_path / "c.toml")
        first, second, third = (sample.group for sample in manifest.samples)
        assert first == second != third
        assert not {first, third} & {"DOE", "ROE", pseudonym("P1"), pseudonym("P2")}
    (tmp_path / "c.toml").write_text('group = { column = "group", hash = false }', encoding="utf-8")
    manifest = read_manifest(tmp_path / "m.csv", tmp_path / "c.toml")
    assert [sample.group for sample in manifest.samples] == ["DOE", "DOE", "ROE"]


def test_a_store_of_dicoms_hashes_what_a_table_of_ids_says(tmp_path, key_file):
    lines = ["id,group,mask,note", "a,P1,DOE.npy,DOE", "b,0123456789ab,,DOE"]
    (tmp_path / "m.csv").write_text("\n".join(lines), encoding="utf-8")
    manifest = read_manifest(tmp_path / "m.csv", by_id=True, known_groups={"0123456789ab"})
    first, second = manifest.samples
    assert first.group == load_key().pseudonym("P1", 12)
    assert second.group == "0123456789ab"
    assert manifest.key_mark == load_key().mark
    assert "DOE" not in repr([(s.mask, s.extra) for s in manifest.samples])


def test_a_dicom_is_known_by_its_content_whatever_it_is_called(tmp_path, key_file):
    for name in ("c1.img", "IM_1.2_xa"):
        write_dicom(tmp_path / name, angiogram(1, 16, 8)[0], PositionerPrimaryAngle="30")
    (tmp_path / "note.txt").write_text("none", encoding="utf-8")
    (tmp_path / "empty.dcm").write_bytes(b"")
    manifest = read_manifest(tmp_path)
    assert [s.primary_angle_deg for s in manifest.samples] == [30.0, 30.0]
    (aside,) = manifest.set_aside
    assert "not a DICOM file" in aside.reason
    (tmp_path / "m.csv").write_text("image\nc1.img\n", encoding="utf-8")
    (sample,) = read_manifest(tmp_path / "m.csv").samples
    assert sample.source.endswith(".dcm")
    assert sample.primary_angle_deg == 30.0


def test_a_dicom_under_the_suffix_of_another_format_is_set_aside_where_it_is_read(tmp_path):
    # Its header, and with it whose it is, was not looked at when the table was read.
    write_dicom(tmp_path / "a.png", angiogram(1, 16, 8)[0], PatientID="Quackenbush")
    (tmp_path / "m.csv").write_text("image\na.png\n", encoding="utf-8")
    (sample,) = read_manifest(tmp_path / "m.csv").samples
    with pytest.raises(ImageError, match=r"let its name end in \.dcm"):
        probe(sample)


def test_files_that_tell_of_text_in_their_pixels_are_counted_in_a_table_too(tmp_path):
    for name, burnt in (("a.dcm", "YES"), ("b.dcm", "NO"), ("c.dcm", "YES")):
        write_dicom(tmp_path / name, angiogram(1, 16, 8)[0], BurnedInAnnotation=burnt)
    (tmp_path / "m.csv").write_text("image\na.dcm\nb.dcm\nc.dcm\n", encoding="utf-8")
    notes = [n for n in read_manifest(tmp_path / "m.csv").notes if "burnt" in n]
    assert [note[:7] for note in notes] == ["2 DICOM"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders there")
def test_a_pipe_is_refused_wherever_a_file_is_named(tmp_path):
    for name in ("pipe", "pipe.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ManifestError, match="is no file but a pipe"):
        read_manifest(tmp_path / "pipe")
    with pytest.raises(ManifestError, match=r"columns file .* is no file but a pipe"):
        read_manifest(tmp_path, tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"classes .* is no file but a pipe"):
        parse_classes(str(tmp_path / "pipe.json"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders there")
def test_a_pipe_among_pictures_is_a_sample_that_cannot_be_used(tmp_path):
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images/a.png")
    (sample,) = read_manifest(tmp_path).samples
    with pytest.raises(ImageError, match="is no file but a pipe"):
        probe(sample)


@pytest.mark.parametrize("num_bytes", [500, 600, 700])
def test_a_header_that_ends_before_its_picture_is_damaged_not_without_one(tmp_path, num_bytes):
    path = write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0], PatientComments="x" * 300)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ImageError, match="damaged or truncated DICOM"):
        dicom.read_facts(path, "a")


def test_columns_that_are_emptied_beside_dicom_files_are_told(tmp_path):
    write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0])
    (tmp_path / "m.csv").write_text("image,phase,kept\na.dcm,diastole,1\n", encoding="utf-8")
    (tmp_path / "c.toml").write_text('extra = ["kept"]\n', encoding="utf-8")
    told = [n for n in read_manifest(tmp_path / "m.csv").notes if "empty beside" in n]
    assert ["phase, kept" in note for note in told] == [True]
    listed = read_manifest(tmp_path / "m.csv", tmp_path / "c.toml")
    assert not [n for n in listed.notes if "empty beside" in n]


def test_a_folder_that_may_not_be_read_is_told(tmp_path, key_file, monkeypatch):
    write_dicom(tmp_path / "a.dcm", angiogram(1, 16, 8)[0])
    (tmp_path / "shut").mkdir()
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    manifest = read_manifest(tmp_path)
    assert any("1 folders could not be read" in note for note in manifest.notes)
