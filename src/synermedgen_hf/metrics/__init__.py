"""How well the model answers and synthesises, with intervals over patients."""

from importlib import import_module

_HOME = {
    "PROTOCOLS": "protocols",
    "average": "protocols",
    "check_same_protocol": "protocols",
    "evaluate_case": "protocols",
    "mae": "intensity",
    "mse": "intensity",
    "psnr": "intensity",
    "rmse": "intensity",
    "ms_ssim": "similarity",
    "ms_ssim_synthrad2025": "similarity",
    "ssim": "similarity",
    "ssim_map": "similarity",
    "bone_dice": "clinical",
    "hu_error_by_tissue": "clinical",
    "suv_errors": "clinical",
    "z_consistency": "clinical",
    "load": "modules",
    "combine": "modules",
}

__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
