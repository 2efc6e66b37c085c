"""How the runs of each method are looked at: its views, and what is drawn of them. A new method adds a line."""

from torch import Generator

from pix2rep import pictures_bim, pictures_lrc, pictures_pgl
from pix2rep.config import Config
from pix2rep.data.cache import PreparedCase
from pix2rep.methods.pix2rep import IMAGE_MODE, Pix2Rep
from pix2rep.methods.simclr import SimCLR
from pix2rep.pairs import Views, middle_image, pixels_of, spacing_of, within
from pix2rep.pictures import COMMON, Look, coarsest
from pix2rep.views.spatial import dense, warp_image


def draw(method: Pix2Rep | SimCLR, case: PreparedCase, generator: Generator, mode: str = "linear") -> Views:
    """View 1 stays where it is, view 2 is moved."""
    size, image = method.config.data.size, middle_image(case, method.config.data.size)
    view_1 = method.photometric(image, generator)
    grid = dense(method.spatial(1, size, generator, "cpu", spacing_of(method, case)), size)
    source = pixels_of(grid, size)
    return Views(view_1, warp_image(method.photometric(image, generator), grid, IMAGE_MODE[mode]), source, within(source, size), mode)


def words(config: Config) -> str:
    return (
        "Views are drawn by the run's options `spatial` and `photometric`. The loss saw features through a projection head, which is thrown away and "
        "not used here."
    )


def words_of_simclr(config: Config) -> str:
    return (
        "Views are drawn by the run's options `spatial` and `photometric`; training moves both views, here view 1 stays. The loss saw the mean of the "
        "encoder's last map through a projection head, which is not used here: features are that map, a coarse one, interpolated to the image's size. "
        "Nothing trains the decoder, and nothing asks places of an image to differ."
    )


LOOKS = {
    "pix2rep": Look(lambda method, case, generator: draw(method, case, generator, method.mode), words, COMMON),
    "bim": Look(pictures_bim.draw, pictures_bim.words, (*COMMON, pictures_bim.clusters), own=pictures_bim.own, heads=True),
    "lrc": Look(
        pictures_lrc.draw, pictures_lrc.words, (*COMMON, pictures_lrc.borders, pictures_lrc.alike), pictures_lrc.features, pictures_lrc.own
    ),
    "pgl": Look(pictures_pgl.draw, pictures_pgl.words, COMMON, pictures_pgl.features),
    "simclr": Look(draw, words_of_simclr, COMMON, coarsest),
}
