"""Names, headers and what they tell about patients."""

import numpy as np
import pytest

from guided_diffusion.images.patients import films_of, find_patients, merge, shared_patients

ONE_AND_ONE = [
    "patient_01_left patient_01_right patient_02",
    "Patient-1 patient_001_b patient_2",
    "patientA_1 patientA_2 patientB_1",
    "P001-1 P001-2 P002-1",
    "0123_L 0123_R 0124_L",
    "0123L 0123R 0124L",
    "00000001_000 00000001_001 00000002_000",
    "IM-0115-0001 IM-0115-0002 IM-0117-0001",
    "person1_bacteria_1 person1_virus_2 person2_bacteria_3",
    "patient00001/study1/view1 patient00001/study2/view1 patient00002/study1/view1",
    "p10/p10000032/s1/a p10/p10000032/s2/b p10/p10000764/s3/c",
    "sub-01_ses-01 sub-01_ses-02 sub-02_ses-01",
    "20200101_0123 20210203_0123 20200101_0124",
    "001_pano_pre 001_pano_post 002_pano_pre",
    "anna_left anna_right ben_left",
    "alice_01 alice_02 bob_01 carol_01",
    "anna/1 anna/2 ben/3 carol/4",
    "scan7 scan7_copy scan8",
]
NOTHING_TELLS = [
    "img_01 img_02 img_03",
    "1 2 3",
    "train0 train1 val0 val1",
    " ".join(f"2023_{number:04}" for number in range(30)),
    " ".join(f"{kind}_{number:04}" for number in range(30) for kind in ("well", "ill", "other")),
    "3f2ab91c-1234-4abc-9def-ab12cd34ef56 3f2ab91c-1234-4abc-9def-ab12cd34ef57",
    "covid19_p1 covid19_p2",
]


def groups_of(names):
    found = find_patients(names, [f"{name}.png" for name in names])
    return found.groups, found.said


@pytest.mark.parametrize("names", ONE_AND_ONE)
def test_the_first_two_are_of_one_patient(names):
    groups, said = groups_of(names.split())
    assert groups[:2] == [0, 0]
    assert groups[2:] == [*range(2, len(groups))]
    assert f"{names.split()[0]} and {names.split()[1]} are of one" in said


@pytest.mark.parametrize("names", NOTHING_TELLS)
def test_where_nothing_tells_each_is_alone(names):
    groups, said = groups_of(names.split())
    assert groups == [*range(len(groups))]
    assert said.startswith("warning: nothing tells")


def test_each_name_a_patient():
    groups, said = groups_of(["patient_01", "patient_02", "patient_10"])
    assert groups == [0, 1, 2]
    assert said.endswith("one each")


def test_dicom_files(dicom):
    stored = np.zeros((4, 4), np.uint8)

    def paths(ids, studies):
        return [
            dicom(stored, name=f"{n}.dcm", PatientID=one, StudyInstanceUID=study)
            for n, (one, study) in enumerate(zip(ids, studies))
        ]

    names = ["p1_a", "p2_b", "p1_c"]
    assert find_patients(names, paths("AAB", ["1.2", "1.3", "1.4"])).groups == [0, 0, 2]
    # what says nothing: the names and the studies count
    for ids in ("AAA", ["ANONYMOUS", "0000", ""], [None, None, None]):
        assert find_patients(names, paths(ids, ["1.2", "1.3", "1.4"])).groups == [0, 1, 0]
    assert find_patients(["x", "y", "z"], paths("000", ["1.2", "1.3", "1.2"])).groups == [0, 1, 0]
    damaged = paths("AAB", ["1", "2", "3"])
    with open(damaged[0], "wb") as file:
        file.write(b"nothing")
    assert find_patients(names, damaged).groups == [0, 1, 0]


def test_both_sides():
    one = [("p1_a", "T/p1_a.png"), ("p2_a", "T/p2_a.png")]
    assert shared_patients(one, [("p3_a", "V/p3_a.png")]) == ""
    said = shared_patients(one, [("p2_b", "V/p2_b.png"), ("p1_b", "V/p1_b.png")])
    assert "T/p1_a.png and V/p1_b.png" in said
    assert "1 more pairs" in said
    assert shared_patients(one[:1], [("p1_b", "V/p1_b.png")])
    assert shared_patients(one[:1], [("p3_b", "V/p3_b.png")], ["digest", "digest"])


def test_names_begin_below_the_common_folder():
    assert films_of(["/p1/x/a.png", "/p1/x/y/b.dcm"]) == [
        ("a", "/p1/x/a.png"),
        ("y/b", "/p1/x/y/b.dcm"),
    ]
    assert films_of(["gs://p1/a.b.png"]) == [("a.b", "gs://p1/a.b.png")]


def test_merge():
    assert merge([0, 1, 2, 2, 4], [(4, 1), (3, 0)]) == [0, 1, 0, 0, 1]
    assert merge([0, 1], []) == [0, 1]
