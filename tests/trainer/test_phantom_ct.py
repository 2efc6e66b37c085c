"""CT phantoms: reproducible, in the Decathlon's layout, in Hounsfield units, organs where they belong."""

import nibabel as nib
import numpy as np
import pytest

from pix2rep.data.discover import class_names, discover
from pix2rep.data.phantom_ct import AORTA, LEFT_KIDNEY, LIVER, ORGANS, RIGHT_KIDNEY, SPINE, SPLEEN, write_ct_phantoms


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct")
    write_ct_phantoms(folder, patients=4, seed=3, size=32)
    return folder


def test_layout(root):
    cases = discover(root)
    assert len(cases) == len({case.patient for case in cases}) == 4 and class_names(root) == ORGANS
    for case in cases:
        image, labels = nib.load(case.image), nib.load(case.label)
        assert image.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8 and image.shape == labels.shape
        np.testing.assert_array_equal(image.affine, labels.affine)
        x, y, z = image.header.get_zooms()
        assert x == pytest.approx(y) and 9 < x < 13 and 3 <= z <= 6 and image.shape[2] * z > 220
    assert {nib.aff2axcodes(nib.load(case.image).affine) for case in cases} == {("R", "A", "S"), ("L", "P", "S")}


def test_organs_lie_where_they_belong_and_have_their_density(root):
    for case in discover(root):
        image, labels = (np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj) for path in (case.image, case.label))
        centre = {k: np.argwhere(labels == k).mean(0) for k in range(1, 7)}
        mean = {k: image[labels == k].mean() for k in range(1, 7)}
        assert centre[LIVER][0] > centre[SPINE][0] > centre[SPLEEN][0] and centre[RIGHT_KIDNEY][0] > centre[LEFT_KIDNEY][0]
        assert centre[AORTA][1] > centre[SPINE][1] and centre[LIVER][2] > centre[RIGHT_KIDNEY][2]
        assert 30 < mean[LIVER] < 140 and 20 < mean[SPLEEN] < 150 and mean[SPINE] > 90 and mean[AORTA] > 0
        assert (image[:3, -3:] < -900).all()  # air in front of the body
        assert (labels == LIVER).sum() > 3 * (labels == SPLEEN).sum()


def test_same_arguments_same_bytes_and_a_patient_is_independent_of_their_number(root, tmp_path):
    again = write_ct_phantoms(tmp_path / "again", patients=1, seed=3, size=32)
    for folder in ("imagesTr", "labelsTr"):
        assert (tmp_path / "again" / folder / again[0].name).read_bytes() == (root / folder / again[0].name).read_bytes()
    with pytest.raises(FileExistsError, match="hold the same phantoms"):
        write_ct_phantoms(root, patients=2, seed=3, size=32)


@pytest.mark.parametrize("bad", [{"patients": 0}, {"size": 16}, {"gap": (0.5, 2)}, {"noise": -1}], ids=str)
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        write_ct_phantoms(tmp_path / "p", **bad)
