"""Models: timm backbones, heads, and the segmenter that joins them."""
