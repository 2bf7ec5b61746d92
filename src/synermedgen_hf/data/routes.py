"""The 22 routes of SynerMedGen: which modality can be made from which, and where in the body."""

from typing import NamedTuple

MODALITIES = ("T1", "T1CE", "T2", "FLAIR", "MRI", "CT", "CBCT", "PET")
REGIONS = ("brain", "pelvis", "whole-body")


class Route(NamedTuple):
    """One direction of synthesis. `MRI` is SynthRAD's MR of any sequence; T1, T1CE, T2 and FLAIR are BraTS's."""

    region: str
    source: str
    target: str

    @property
    def name(self) -> str:
        """As it stands in a checkpoint's `trained_routes`, such as `"brain/MRI-CT"`."""
        return f"{self.region}/{self.source}-{self.target}"

    def __str__(self) -> str:
        return f"{self.region}: {self.source}->{self.target}"


_BRATS = ("T1", "T1CE", "T2", "FLAIR")
ROUTES: tuple[Route, ...] = (
    *(
        Route(region, *pair)
        for region in ("brain", "pelvis")
        for pair in (("MRI", "CT"), ("CT", "MRI"), ("CBCT", "CT"), ("CT", "CBCT"))
    ),
    Route("whole-body", "CT", "PET"),
    Route("whole-body", "PET", "CT"),
    *(Route("brain", source, target) for source in _BRATS for target in _BRATS if source != target),
)
