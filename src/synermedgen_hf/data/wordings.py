"""The sentences of the understanding tasks: questions, and descriptions of what a change of modality changes and keeps.

A description names a change and what stays, so that neither alone gives it away. Every direction has a pool of them:
sentences of its own where it is one of the routes, and sentences built from how its two modalities look, which serve
any pair. Opposite directions mirror each other sentence by sentence, so length says nothing about direction, and no
sentence is true of two directions: those of plain T1 say that there is no contrast agent, those between T2 and FLAIR
that the weighting is kept.
"""

from functools import cache

from ..processing_synermedgen import MODALITY_NAMES, REGION_NAMES

# Of modalities that are told apart only by a detail: what to ask for when the other one is shown too.
CLARIFIED = {
    "CT": ("CBCT", "conventional (not cone-beam) CT"),
    "T1": ("T1CE", "T1-weighted MRI without contrast agent"),
    "T2": ("FLAIR", "T2-weighted MRI with bright fluid"),
}

# In all questions the images come before the text, in the order of their letters.
CTS_QUESTIONS = (
    "The first image shows the {region} in {source}. Images {letters} are {target} slices of the same patient. Which "
    "of them shows the same slice? Answer with its letter.",
    "Image 1: {source}, {region}. Candidates {letters}: {target}. Which candidate has the same slice position as "
    "image 1? Give the letter only.",
    "Find the {target} partner of the {source} image that comes first: which of {letters} shows exactly the same "
    "place? Reply with one letter.",
    "One {source} slice is followed by {count} {target} slices ({letters}) from a single scan. Which of them "
    "is its counterpart, slice for slice? Letter only.",
    "{letters} are {target} slices of one volume. Pick the one that matches the anatomy of the {source} reference in "
    "front of them, and answer with its letter.",
    "Reference: {source} of the {region}. Which {target} image, {letters}, shows the same section of the body? Answer "
    "with a letter.",
)
MI_QUESTIONS = (
    "The images are panels {letters}. Which panel is {target}? Answer with its letter.",
    "One of the {count} images, {letters}, is {target}. Which one? Give the letter only.",
    "Panels {letters} come from different scanners or sequences. Find the {target} and reply with its letter.",
    "Among {letters}, which picture is {target}? Letter only.",
    "Which of the panels {letters} shows {target}? Answer with one letter.",
)
LISTING_QUESTIONS = (
    "The images are panels {letters}. Name the modality of each, as in `A: CT, B: PET`.",
    "Which modality is each of the panels {letters}? List them as letter and modality.",
    "Say for each panel, {letters}, how it was acquired, in the form `A: CT, B: PET`.",
)
TIA_QUESTIONS = (
    "Both images show the same slice. Which description fits the change from the first image to the second? Answer "
    "with its letter.",
    "Image 1 was turned into image 2. Which of the descriptions says what changed and what did not? Give the letter "
    "only.",
    "Going from the first picture to the second, which statement is right? Reply with one letter.",
    "Pick the description of the step from image 1 to image 2, in this direction. Letter only.",
    "The second image is another modality of the first. Which text tells how they differ? Answer with a letter.",
)
VQA_QUESTIONS = {
    "region": "Which part of the body does this scan cover?",
    "plane": "Is this slice axial or coronal?",
    "lesion": "Is there a lesion in this slice?",
    "side": "On which side of the picture does the lesion lie?",
}

# What stays.
STAYS = (
    "Anatomy, pose and slice position stay the same.",
    "Every structure that is shown keeps its place and size.",
    "It is still the same slice of the same patient.",
    "Nothing moves: shapes and borders lie where they were.",
)
STAYS_OF_REGION = {
    "brain": ("Ventricles, sulci and midline keep their place.", "The folds of the cortex are where they were."),
    "pelvis": ("Hips, sacrum and bladder keep their place.", "The organs lie where they lay before."),
    "whole-body": ("Lungs, liver and spine keep their place.", "Head, trunk and limbs lie as they lay before."),
    "abdomen": ("Liver, kidneys and spine keep their place.", "The organs lie where they lay before."),
    "thorax": ("Lungs, heart and spine keep their place.", "Ribs and vessels run where they ran before."),
    "head-neck": ("Jaw, airway and spine keep their place.", "Muscles and vessels run where they ran before."),
    "heart": ("Chambers and heart wall keep their place.", "The thickness of the heart muscle is unchanged."),
}
# Where FDG gathers without any disease.
HOT_SPOTS = {
    "brain": "grey matter",
    "pelvis": "the bladder",
    "whole-body": "the brain, the bladder and often the heart",
    "abdomen": "the kidneys",
    "thorax": "often the heart",
    "head-neck": "the brain",
    "heart": "often the heart muscle",
}

# How a modality looks, in a few words and in more.
BRIEFLY = {
    "T1": "plain T1 signal with dark fluid",
    "T1CE": "T1 signal with enhanced vessels",
    "T2": "T2 signal with bright fluid",
    "FLAIR": "T2 signal with nulled fluid",
    "MRI": "magnetic resonance signal",
    "CT": "calibrated X-ray density",
    "CBCT": "shaded and streaky cone-beam density",
    "PET": "blurred tracer uptake",
}
LOOKS = {
    "T1": (
        "dark fluid among T1-weighted greys, with no contrast agent given",
        "unenhanced T1 weighting in which fluid is black and vessels are not lit up",
    ),
    "T1CE": (
        "dark fluid among T1-weighted greys, with vessels and leaky tissue shining from gadolinium",
        "enhanced T1 weighting in which fluid is black and blood and active rims are lit up",
    ),
    "T2": (
        "T2-weighted greys in which free water is brightest and swollen tissue is bright too",
        "white fluid and darker solid tissue, as after a long echo time",
    ),
    "FLAIR": (
        "T2-weighted greys in which free water is suppressed but swollen tissue is bright",
        "black free fluid beside bright oedema, as after an inversion pulse that nulls fluid",
    ),
    "MRI": (
        "well separated soft tissues in arbitrary units, with compact bone as black as air",
        "soft-tissue contrast that comes from relaxation, and no signal of compact bone",
    ),
    "CT": (
        "white bone, narrow greys of soft tissue and black air on the Hounsfield scale",
        "sharp borders and even greys of attenuation, highest in bone, with fat darker than muscle",
    ),
    "CBCT": (
        "bone and soft tissue under scatter shading, rings and noise, with drifting CT numbers",
        "a cupped and streaky field of view with weak borders between soft tissues",
    ),
    "PET": (
        "a coarse map of glucose use in SUV, bright where tissue is active",
        "glowing spots of tracer on a noisy and nearly black background",
    ),
}
NAMES = {**MODALITY_NAMES, "T1": "T1-weighted MRI without contrast agent"}
# `{Brief}` begins a sentence.
FRAMES = (
    "{Brief_source} becomes {brief_target}.",
    "From {source} to {target}: one now sees {look_target}.",
    "The appearance differs: {look_target}, and no longer {look_source}.",
    "The first image is {source}, the second {target}.",
    "What was {brief_source} is gone, and the picture shows {look_target}.",
    "{Brief_target} takes the place of {brief_source}.",
    "The first image shows {look_source}; the second, {look_target}.",
    "What {source} showed is shown as {target} would: {look_target}.",
)

# What changes, in sentences of the route's own, `{hot}` from HOT_SPOTS. Opposite directions stand line by line.
CHANGES = {
    ("MRI", "CT"): (
        "Bone turns bright, and soft tissue flattens to nearly one grey.",
        "Soft-tissue contrast is lost while compact bone lights up; air stays black.",
        "Signal in arbitrary units gives way to Hounsfield units: compact bone, dark before, is now brightest, and fat "
        "falls below muscle.",
        "The dark rim of compact bone becomes white, and organs are told apart by small differences in density only.",
        "Magnetic resonance contrast is replaced by attenuation.",
    ),
    ("CT", "MRI"): (
        "Bone turns dark, and soft tissue spreads over many greys.",
        "Soft-tissue contrast is gained while compact bone goes out; air stays black.",
        "Hounsfield units give way to signal in arbitrary units: compact bone, brightest before, is now dark, and fat "
        "rises above muscle.",
        "The white rim of compact bone becomes dark, and organs are told apart by relaxation rather than by density.",
        "Attenuation is replaced by magnetic resonance contrast.",
    ),
    ("CBCT", "CT"): (
        "Scatter shading, cupping and streaks go, and the greys become true Hounsfield units.",
        "A noisy and unevenly shaded picture becomes clean and even.",
        "Rings and streaks are removed, the scatter-darkened centre is lifted, and muscle, fat and bone take "
        "calibrated CT numbers.",
        "The artefacts of an onboard scanner disappear, and whatever its round field of view cut off is shown in full.",
        "A positioning scan turns into a diagnostic CT, with less noise and firmer borders between fat and muscle.",
    ),
    ("CT", "CBCT"): (
        "Scatter shading, cupping and streaks come, and the greys are no longer true Hounsfield units.",
        "A clean and even picture becomes noisy and unevenly shaded.",
        "Rings and streaks are added, scatter darkens the centre, and muscle, fat and bone lose their calibrated CT "
        "numbers.",
        "The artefacts of an onboard scanner appear, and whatever lies outside its round field of view is cut off.",
        "A diagnostic CT turns into a positioning scan, with more noise and weaker borders between fat and muscle.",
    ),
    ("CT", "PET"): (
        "Density gives way to tracer uptake, at a coarser resolution.",
        "Bone no longer stands out; what FDG makes bright now is {hot}.",
        "Sharp greys turn into a blurred map of sugar uptake in SUV, in which fat and bone fade and quiet tissue is "
        "nearly black.",
        "The picture no longer says how tissue absorbs X-rays but how much glucose it burns: edges blur, noise comes "
        "in, and active tumours, if any, begin to glow.",
        "Anatomical detail is exchanged for metabolism, with the strongest signal in {hot}.",
    ),
    ("PET", "CT"): (
        "Tracer uptake gives way to density, at a finer resolution.",
        "FDG no longer lights up {hot}; what is bright now is bone.",
        "A blurred map of sugar uptake in SUV turns into sharp greys, in which bone is white and fat is darker than "
        "muscle.",
        "The picture no longer says how much glucose tissue burns but how it absorbs X-rays: edges sharpen, bone comes "
        "up, and active tumours, if any, lose their glow.",
        "Metabolism, strongest in {hot}, is exchanged for anatomical detail.",
    ),
    ("T1", "T1CE"): (
        "Contrast agent lights up vessels and any active tumour rim; T1 greys and dark fluid are as before.",
        "Gadolinium is put into an otherwise unchanged T1 picture.",
        "Vessels, meninges and leaky tumour tissue brighten, while fluid stays dark and white matter above grey.",
        "Both images are T1-weighted, and only the second one shows enhancement.",
        "What lacks a blood-brain barrier gains signal, such as vessels, dura and, if there is a tumour, the border "
        "around its core; all other T1 greys persist.",
    ),
    ("T1CE", "T1"): (
        "Contrast agent leaves vessels and any active tumour rim; T1 greys and dark fluid are as before.",
        "Gadolinium is taken out of an otherwise unchanged T1 picture.",
        "Vessels, meninges and leaky tumour tissue darken, while fluid stays dark and white matter above grey.",
        "Both images are T1-weighted, and only the first one shows enhancement.",
        "What lacks a blood-brain barrier loses signal, such as vessels, dura and, if there is a tumour, the border "
        "around its core; all other T1 greys persist.",
    ),
    ("T1", "T2"): (
        "With no contrast agent in either, fluid turns from dark to bright and white matter drops below grey.",
        "Plain T1 weighting becomes T2 weighting: black ventricles turn white.",
        "No enhancement is lost, for there was none; free water and swollen tissue begin to shine.",
        "An unenhanced T1 picture turns into a T2 picture in which ventricles and sulci are brightest and any oedema, "
        "dull before, stands out.",
        "Unenhanced T1 greys are turned over: CSF goes from black to white.",
    ),
    ("T2", "T1"): (
        "With no contrast agent in either, fluid turns from bright to dark and white matter rises above grey.",
        "T2 weighting becomes plain T1 weighting: white ventricles turn black.",
        "No enhancement is gained, for none was given; free water and swollen tissue cease to shine.",
        "A T2 picture turns into an unenhanced T1 picture in which ventricles and sulci are darkest and any oedema, "
        "bright before, is dull.",
        "T2 greys are turned over into unenhanced T1: CSF goes from white to black.",
    ),
    ("T1", "FLAIR"): (
        "With no contrast agent in either, fluid stays dark while oedema and lesions turn bright.",
        "Plain T1 weighting becomes fluid-suppressed T2 weighting: ventricles stay black.",
        "No enhancement is lost, for there was none; free water stays dark, and swollen tissue begins to shine.",
        "An unenhanced T1 picture turns into a T2-like picture with nulled CSF, in which white matter is darker than "
        "grey and any oedema, dull before, stands out.",
        "Unenhanced T1 greys are replaced, but for CSF, which is black in both.",
    ),
    ("FLAIR", "T1"): (
        "With no contrast agent in either, fluid stays dark while oedema and lesions turn dull.",
        "Fluid-suppressed T2 weighting becomes plain T1 weighting: ventricles stay black.",
        "No enhancement is gained, for none was given; free water stays dark, and swollen tissue ceases to shine.",
        "A T2-like picture with nulled CSF turns into an unenhanced T1 picture, in which white matter is brighter than "
        "grey and any oedema, bright before, is dull.",
        "Unenhanced T1 greys come in, but for CSF, which is black in both.",
    ),
    ("T2", "FLAIR"): (
        "T2 weighting is kept and fluid suppressed: CSF goes from brightest to dark, oedema stays bright.",
        "An inversion pulse nulls the free water of an otherwise T2-weighted picture.",
        "White ventricles and sulci turn black, while lesions stay as T2-bright as they were and become easier to see.",
        "Both images are T2-weighted, and only the first one shows bright CSF.",
        "Of all the T2 signal only that of free fluid disappears, which darkens ventricles and sulci and leaves any "
        "oedema next to them bright.",
    ),
    ("FLAIR", "T2"): (
        "T2 weighting is kept and fluid released: CSF goes from dark to brightest, oedema stays bright.",
        "The inversion pulse that nulled free water is left out of an otherwise T2-weighted picture.",
        "Black ventricles and sulci turn white, while lesions stay as T2-bright as they were and become harder to see.",
        "Both images are T2-weighted, and only the second one shows bright CSF.",
        "To the T2 signal only that of free fluid is added, which brightens ventricles and sulci and leaves any oedema "
        "next to them bright.",
    ),
    ("T1CE", "T2"): (
        "Enhancement of vessels and tumour rims vanishes, and fluid turns from dark to bright.",
        "Enhanced T1 weighting becomes T2 weighting: black ventricles turn white.",
        "Contrast agent no longer shows; free water and swollen tissue begin to shine instead.",
        "A T1 picture with lit-up vessels turns into a T2 picture in which ventricles and sulci are brightest and any "
        "oedema, dull before, stands out.",
        "Lit-up vessels fade, CSF goes from black to white, and white matter drops below grey.",
    ),
    ("T2", "T1CE"): (
        "Enhancement of vessels and tumour rims appears, and fluid turns from bright to dark.",
        "T2 weighting becomes enhanced T1 weighting: white ventricles turn black.",
        "Contrast agent begins to show; free water and swollen tissue no longer shine.",
        "A T2 picture turns into a T1 picture with lit-up vessels, in which ventricles and sulci are darkest and any "
        "oedema, bright before, is dull.",
        "Vessels light up, CSF goes from white to black, and white matter rises above grey.",
    ),
    ("T1CE", "FLAIR"): (
        "Enhancement of vessels and tumour rims vanishes, fluid stays dark, and oedema turns bright.",
        "Enhanced T1 weighting becomes fluid-suppressed T2 weighting: ventricles stay black.",
        "Contrast agent no longer shows; free water stays dark, and swollen tissue begins to shine.",
        "A T1 picture with lit-up vessels turns into a T2-like picture with nulled CSF, in which white matter is "
        "darker than grey and any oedema, dull before, stands out.",
        "Lit-up vessels fade, CSF remains black, and white matter drops below grey.",
    ),
    ("FLAIR", "T1CE"): (
        "Enhancement of vessels and tumour rims appears, fluid stays dark, and oedema turns dull.",
        "Fluid-suppressed T2 weighting becomes enhanced T1 weighting: ventricles stay black.",
        "Contrast agent begins to show; free water stays dark, and swollen tissue ceases to shine.",
        "A T2-like picture with nulled CSF turns into a T1 picture with lit-up vessels, in which white matter is "
        "brighter than grey and any oedema, bright before, is dull.",
        "Vessels light up, CSF remains black, and white matter rises above grey.",
    ),
}
# Written with the brain before the eyes.
BRAIN_ONLY = {"T1", "T1CE", "T2", "FLAIR"}


def region_name(region: str) -> str:
    """A region in words, whether or not the model's instructions know it."""
    return REGION_NAMES.get(region) or region.replace("-", " ") or "body"


@cache
def describe(source: str, target: str, region: str) -> tuple[str, ...]:
    """
    All wordings of one direction, each with what changes and what stays, in either order.

    Args:
        source, target (`str`): Modalities.
        region (`str`): Where; any other than the known ones gets the sentences that fit everywhere.

    Returns:
        `tuple[str, ...]`: 13 for the routes, 8 for any other pair.

    Raises:
        `KeyError`: Unknown modality.
    """
    words = {"source": NAMES[source], "target": NAMES[target]}
    words |= {"brief_source": BRIEFLY[source], "brief_target": BRIEFLY[target]}
    words |= {key.capitalize(): text[0].upper() + text[1:] for key, text in words.items() if key.startswith("brief")}
    changes = []
    if region == "brain" or not {source, target} & BRAIN_ONLY:
        hot = HOT_SPOTS.get(region, "active tissue")
        changes += [text.format(hot=hot) for text in CHANGES.get((source, target), ())]
    for place, frame in enumerate(FRAMES):
        looks = {"look_source": LOOKS[source][place % 2], "look_target": LOOKS[target][place % 2]}
        changes.append(frame.format(**words, **looks))
    stays = STAYS_OF_REGION.get(region, ()) + STAYS
    return tuple(
        f"{stays[place % len(stays)]} {change}" if place % 3 == 2 else f"{change} {stays[place % len(stays)]}"
        for place, change in enumerate(changes)
    )
