"""PSNR of synthesised slices, for `evaluate.load`."""

from synermedgen_hf.metrics import modules
from synermedgen_hf.metrics.intensity import finite_psnr


class Psnr(modules.SliceMetric):
    name = "psnr"
    about = "Peak signal-to-noise ratio of each slice over the width of the window, in dB; equal slices left out."

    @staticmethod
    def compare(prediction, reference, data_range):
        return finite_psnr(prediction, reference, data_range)
