"""Two views of an image whose geometry is known: spatial grids and photometric changes, batched on the device."""
