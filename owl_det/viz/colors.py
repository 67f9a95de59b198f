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
    """Black or white, whichever is easier to read on `color` (#rrggbb)."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
