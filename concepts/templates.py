"""Training sentences of textual inversion (Gal et al. 2022, arXiv 2208.01618), written for this project; {} is the token.

They make no statement that an image could contradict. So the token learns all that the images share.
"""

from __future__ import annotations

OBJECT = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a picture of a {}",
    "a picture of the {}",
    "an image of a {}",
    "an image of the {}",
    "a rendering of a {}",
    "a close-up photo of a {}",
    "a close-up of the {}",
    "a good photo of a {}",
    "a bright photo of the {}",
    "a small picture of a {}",
    "a cropped photo of the {}",
    "a {}",
    "the {}",
    "there is a {}",
    "a snapshot of my {}",
)
STYLE = (
    "a picture in the style of {}",
    "a photo in the style of {}",
    "an image in the style of {}",
    "a rendering in the style of {}",
    "a close-up in the style of {}",
    "a small picture in the style of {}",
    "a bright picture in the style of {}",
    "a good picture in the style of {}",
    "the object in the style of {}",
    "an object in the style of {}",
    "a thing in the style of {}",
    "something in the style of {}",
    "an object, in {} style",
    "a picture, {} style",
    "a picture of a thing in the style of {}",
    "a photo of an object in the style of {}",
)
