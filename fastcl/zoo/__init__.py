"""Models by name, of timm and torchvision, as encoders of images: for `fastcl align --models`."""
