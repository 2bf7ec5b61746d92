"""PSNR of synthesised slices, for `evaluate.load`."""

from synermedgen_hf.metrics import modules
from synermedgen_hf.metrics.intensity import psnr


class Psnr(modules.SliceMetric):
    name = "psnr"
    about = "Peak signal-to-noise ratio of each slice over the width of the window, in dB."

    @staticmethod
    def compare(prediction, reference, data_range):
        return psnr(prediction, reference, data_range)
