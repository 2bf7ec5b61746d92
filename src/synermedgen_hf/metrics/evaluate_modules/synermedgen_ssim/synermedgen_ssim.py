"""SSIM of synthesised slices, for `evaluate.load`."""

from synermedgen_hf.metrics import modules
from synermedgen_hf.metrics.inputs import check_structure
from synermedgen_hf.metrics.similarity import ssim


class Ssim(modules.SliceMetric):
    name = "ssim"
    about = "SSIM: uniform window of 7 x 7, K 0.01 and 0.03, sample covariance, without the outermost 3 pixels."

    @staticmethod
    def compare(prediction, reference, data_range):
        check_structure(reference)
        return ssim(prediction, reference, data_range)
