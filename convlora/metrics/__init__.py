"""Scores of predictions against masks, at the images' own size.

A score is a pure function of one image: `prob` is an 8-bit probability map uint8 [h, w], 0 to 255, just as
`convlora.predict` writes it, `mask` a boolean array [h, w]. `base.ImageMean` averages it over images. What is
no mean over images (counts pooled over the data set, curves, classes) is a `base.Sums`.
"""
