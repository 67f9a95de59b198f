"""Colours of boxes and lines: those of Okabe and Ito, which colour-blind readers tell apart."""

# Neighbours differ most; the second half is the first, darker, for data sets of more classes.
BOXES = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442"),
    *("#00436b", "#946600", "#005c43", "#8a3c00", "#2a789f", "#87406a", "#a39b13"),
)
# Dark enough for thin lines on white.
LINES = (
    *("#0072b2", "#d55e00", "#008a64", "#a6568a", "#b87f00", "#2a89bd", "#5c4b00"),
    *("#7a0f3d", "#00436b", "#4d7c0f"),
)
GRID = "#dddddd"
PLAIN = "#9db8d9"  # what is beside the point


def of_class(index: int) -> str:
    """The colour of a class: its boxes have it in every picture."""
    return BOXES[index % len(BOXES)]


def contrast(color: str) -> str:
    """Black or white, whichever stands out more from `color` (#rrggbb), by the rule of WCAG 2."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "black" if luminance > 0.179 else "white"
