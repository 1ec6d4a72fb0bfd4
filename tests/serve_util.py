"""A page to test: a predictor that needs no network, and radiographs to drop in."""

import socket

import numpy as np
from PIL import Image

from guided_diffusion.images.image_io import read_image
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference.uncertainty import entropy_map
from guided_diffusion.segmentation.prediction import Prediction


class Halves:
    """Calls the left half class 1 and the rest background."""

    def __init__(self, classes=2):
        self.categories = generic_categories(classes)

    def read(self, path):
        return read_image(path, 1)

    def start(self, images):
        def finish(image):
            probabilities = np.zeros((len(self.categories), *image.shape), np.float32)
            probabilities[1, :, : image.shape[1] // 2] = 0.9
            probabilities[0] = 1 - probabilities[1]
            return Prediction(probabilities, entropy_map(probabilities))

        return [lambda image=image: finish(image) for image in images]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write(path, size=(30, 40), grey=90):
    Image.fromarray(np.full(size, grey, np.uint8)).save(path)
    return path
