"""MAE of synthesised slices, for `evaluate.load`."""

from synermedgen_hf.metrics import modules
from synermedgen_hf.metrics.intensity import mae


class Mae(modules.SliceMetric):
    name = "mae"
    about = "Mean absolute error, in the unit of the images."
    needs_window = False

    @staticmethod
    def compare(prediction, reference, data_range):
        return mae(prediction, reference)
