"""RMSE of synthesised slices, for `evaluate.load`."""

from synermedgen_hf.metrics import modules
from synermedgen_hf.metrics.intensity import rmse


class Rmse(modules.SliceMetric):
    name = "rmse"
    about = "Root of the mean squared error of each slice, in the unit of the images."
    needs_window = False

    @staticmethod
    def compare(prediction, reference, data_range):
        return rmse(prediction, reference)
