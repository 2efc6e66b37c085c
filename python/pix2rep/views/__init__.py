"""Two views of an image whose geometry is known: spatial grids and photometric changes, batched on the device."""

from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, identity, warp_image, warp_labels

__all__ = ["Photometric", "SpatialView", "identity", "warp_image", "warp_labels"]
