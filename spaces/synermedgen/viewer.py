"""What the Space shows of a result: pairs of pictures, windows by name, and values in the scans' own units."""

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
from PIL import Image

from synermedgen_hf.image_processing_synermedgen import to_display
from synermedgen_hf.volumes.reading import Volume, slice_spacing, slices_of

# Windows as radiology uses them: lowest and highest value shown. PET is shown dark on white, as is usual.
HU_WINDOWS = {
    "Whole range": (-1024, 3071),
    "Body": (-1000, 1000),
    "Soft tissue": (-160, 240),
    "Brain": (0, 80),
    "Bone": (-450, 1050),
    "Lung": (-1350, 150),
}
SUV_WINDOWS = {"0 to 5 SUV": (5, 0), "0 to 10 SUV": (10, 0), "0 to 20 SUV": (20, 0)}
SHOWN_PIXELS = 640  # the longer side of a picture on the page
BLUE_WHITE_RED = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]], np.float64)


@dataclass
class Layer:
    """
    One scan on the page.

    Args:
        title (`str`): Such as `"Synthetic CT"`.
        modality, unit (`str`): Such as `"CT"` and `"HU"`.
        slices (`np.ndarray`): `(slices, rows, columns)` in the unit.
        window (`tuple[float, float]`): The modality's whole range in this scan.
    """

    title: str
    modality: str
    unit: str
    slices: np.ndarray
    window: tuple[float, float]

    @property
    def windows(self) -> dict[str, tuple[float, float]]:
        """Windows to choose from, by name."""
        if self.unit == "HU":
            return HU_WINDOWS
        if self.unit == "SUV":
            return SUV_WINDOWS
        low, high = self.window
        return {"Whole range": (low, high), "Dark tissue": (low, (low + high) / 2), "Bright tissue": (high / 3, high)}

    @property
    def usual_window(self) -> str:
        """The one to begin with."""
        return {"HU": "Body", "SUV": "0 to 5 SUV"}.get(self.unit, "Whole range")

    def number(self, value: float) -> str:
        """A value with as many digits as its unit deserves: those of an MR, which is of any scale, by its window."""
        if self.unit == "SUV":
            return f"{value:.2f}"
        width = self.window[1] - self.window[0]
        return f"{value:.0f}" if self.unit == "HU" or width > 50 else f"{value:.{2 if width > 0.5 else 4}f}"


@dataclass
class Result:
    """
    What one visitor looks at.

    Args:
        source, reference ([`Layer`]): The scan, and what was measured in the target's modality, if it was given.
        made, spread (`dict[str, Layer]`): Target to synthesis, and to its deviation over seeds if there were several.
        spacing (`tuple[float, float]`): mm between rows and columns.
        upload (`str`): The file that the scan was read from.
        syntheses (`dict`): Target to [`VolumeSynthesis`], to be written.
    """

    source: Layer
    spacing: tuple[float, float]
    upload: str
    made: dict[str, Layer] = field(default_factory=dict)
    spread: dict[str, Layer] = field(default_factory=dict)
    reference: Layer | None = None
    syntheses: dict = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        layers = [self.source, self.reference, *self.made.values(), *self.spread.values()]
        return sum(layer.slices.nbytes for layer in layers if layer is not None)

    def nearest(self, target: str, index: float = 0) -> tuple[str, int]:
        """What there is of what a page asks for, which may still show the result before: a target and a slice."""
        if target not in self.made:
            target = next(iter(self.made))
        return target, min(max(int(index), 0), len(self.source.slices) - 1)

    def views(self, target: str) -> list[str]:
        """What can lie under the slider for a target."""
        views = ["Source and synthesis"]
        if self.reference is not None and self.reference.modality == target:
            views += ["Reference and synthesis", "Difference from the reference"]
        return [*views, "Spread over seeds"] if target in self.spread else views


class Results:
    """The results of all visitors, by their session; the oldest go when there are too many bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.lock = max_bytes, Lock()
        self.results: OrderedDict[str, Result] = OrderedDict()

    def put(self, session: str, result: Result):
        with self.lock:
            self.results[session] = result
            self.results.move_to_end(session)
            while len(self.results) > 1 and sum(each.nbytes for each in self.results.values()) > self.max_bytes:
                self.results.popitem(last=False)

    def get(self, session: str) -> Result | None:
        with self.lock:
            return self.results.get(session)

    def drop(self, session: str):
        with self.lock:
            self.results.pop(session, None)


def layer_of(title: str, modality: str, volume: Volume, axis: str, image_processor) -> Layer:
    """A volume as it is looked at along an axis."""
    window = image_processor.intensity_window(volume.array, modality)
    return Layer(title, modality, image_processor.intensity[modality]["unit"], slices_of(volume, axis), window)


def in_plane(volume: Volume, axis: str) -> tuple[float, float]:
    """mm between the rows and columns of a volume's slices."""
    return slice_spacing(volume, axis)[1:]


def difference_scale(layer: Layer) -> float:
    """The difference at which the map is fully red or blue."""
    return {"HU": 200.0, "SUV": 2.0}.get(layer.unit, (layer.window[1] - layer.window[0]) / 4)


def difference(result: Result, target: str, index: int) -> np.ndarray:
    """Synthesis minus reference of one slice. MR has no absolute scale: its reference is put on the synthesis's."""
    made, reference = result.made[target], result.reference
    wanted = reference.slices[index].astype(np.float32)
    if made.unit not in ("HU", "SUV"):
        wanted = wanted * (made.window[1] / reference.window[1])
    return made.slices[index] - wanted


def picture(array: np.ndarray, window: tuple[float, float], spacing: tuple[float, float]) -> Image.Image:
    """One slice as it is shown: windowed, with square pixels, enlarged to be seen."""
    return _enlarged(to_display(array, window), array.shape, spacing)


def difference_picture(array: np.ndarray, scale: float, spacing: tuple[float, float]) -> Image.Image:
    """Blue where it is lower, red where it is higher, white where it is the same."""
    place = np.clip(array / scale, -1, 1) + 1
    colours = [np.interp(place, [0, 1, 2], BLUE_WHITE_RED[:, channel]) for channel in range(3)]
    image = Image.fromarray(np.rint(np.stack(colours, -1)).astype(np.uint8))
    return _enlarged(image, array.shape, spacing)


def _enlarged(image: Image.Image, shape: tuple[int, int], spacing: tuple[float, float]) -> Image.Image:
    height, width = shape[0] * spacing[0], shape[1] * spacing[1]
    factor = SHOWN_PIXELS / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def pair(
    result: Result, target: str, view: str, index: int, source_window: str, target_window: str
) -> tuple[Image.Image, Image.Image]:
    """The two pictures under the slider."""
    made, spacing = result.made[target], result.spacing
    window = made.windows.get(target_window) or made.windows[made.usual_window]
    right = picture(made.slices[index], window, spacing)
    if view == "Reference and synthesis":
        scale = result.reference.window if made.unit == "a.u." and target_window == "Whole range" else window
        return picture(result.reference.slices[index], scale, spacing), right
    if view == "Difference from the reference":
        return right, difference_picture(difference(result, target, index), difference_scale(made), spacing)
    if view == "Spread over seeds":
        spread = result.spread[target]
        return right, picture(spread.slices[index], (0, difference_scale(made) / 2), spacing)
    source = result.source
    window = source.windows.get(source_window) or source.windows[source.usual_window]
    return picture(source.slices[index], window, spacing), right


def layers(result: Result, target: str) -> list[Layer]:
    """The scans of the table, in order."""
    found = [result.source, result.made[target]]
    if result.reference is not None and result.reference.modality == target:
        found.append(result.reference)
    return found + ([result.spread[target]] if target in result.spread else [])


def table(result: Result, target: str, index: int, point: tuple[float, float] | None = None) -> str:
    """
    Values of one slice as an HTML table.

    Args:
        result ([`Result`]), target (`str`), index (`int`): What is looked at.
        point (`tuple[float, float]`, *optional*): Where the pointer is, as shares of the picture's width and height.
    """
    rows, at = [], None
    if point is not None:
        height, width = result.source.slices.shape[1:]
        at = min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)
    entries = [(layer.title, layer, layer.slices[index]) for layer in layers(result, target)]
    made = result.made[target]
    if result.reference is not None and result.reference.modality == target:
        entries.append(("Synthesis − reference", made, difference(result, target, index)))
    for title, layer, values in entries:
        here = layer.number(values[at]) if at else "–"
        low, middle, high = map(layer.number, np.percentile(values, (0, 50, 100)))
        cells = "".join(f"<td>{cell}</td>" for cell in (low, middle, high))
        rows.append(
            f"<tr><th scope=row>{title}</th><td class=point>{here}</td>{cells}<td class=unit>{layer.unit}</td></tr>"
        )
    where = f"row {at[0]}, column {at[1]}" if at else "point at the picture"
    note = ""
    if result.reference is not None and result.reference.modality == target:
        mean = made.number(np.abs(difference(result, target, index)).mean())
        note = f"<p>Mean absolute difference over the whole frame of this slice: {mean} {made.unit}.</p>"
    heads = f"<th class=point>{where}</th><th>lowest</th><th>median</th><th>highest</th><th></th>"
    head = f"<tr><th>This slice</th>{heads}</tr>"
    return f"<table class=values><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>{note}"
