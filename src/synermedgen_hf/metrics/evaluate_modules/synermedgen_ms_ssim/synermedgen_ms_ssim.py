"""MS-SSIM of synthesised slices, for `evaluate.load`."""

from synermedgen_hf.metrics import modules
from synermedgen_hf.metrics.inputs import check_structure
from synermedgen_hf.metrics.similarity import ms_ssim


class MsSsim(modules.SliceMetric):
    name = "ms_ssim"
    about = "MS-SSIM of Wang 2003: five scales, Gaussian window of 11 x 11, sigma 1.5, without the outermost 5 pixels."

    @staticmethod
    def compare(prediction, reference, data_range):
        check_structure(reference)
        return ms_ssim(prediction, reference, data_range)
