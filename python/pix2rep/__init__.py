"""Dense self-supervised pre-training for medical image segmentation: the trainer behind the command `pix2rep`."""
