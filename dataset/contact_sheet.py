"""A picture of some images of a data set with their labels in colour, and the legend of the classes."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .classes import ClassTable, LabelClass
from .images import ImageFile
from .items import DatasetError, Item
from .samples import read_train_ids

# Largest size of an image on the sheet, and how many are in a row, each beside its label
_WIDTH, _HEIGHT, _IN_A_ROW = 320, 240, 2
_MOST = 12
_LINE = 16


def contact_sheet(items: list[Item], classes: ClassTable) -> Image.Image:
    """Up to 12 of the items that can be read, evenly spaced: each beside its label, void is black; then the legend."""
    tiles: list[Image.Image] = []
    for item in items[:: max(len(items) // _MOST, 1)]:
        try:
            tiles.append(_tile(item, classes))
        except DatasetError:
            continue  # the survey tells
    tiles = tiles[:_MOST]
    width = 2 * _WIDTH * _IN_A_ROW
    rows = [tiles[start : start + _IN_A_ROW] for start in range(0, len(tiles), _IN_A_ROW)]
    names = legend(classes.classes, width)
    sheet = Image.new("RGB", (width, sum(max(tile.height for tile in row) for row in rows) + names.height), "white")
    top = 0
    for row in rows:
        for column, tile in enumerate(row):
            sheet.paste(tile, (2 * _WIDTH * column, top))
        top += max(tile.height for tile in row)
    sheet.paste(names, (0, top))
    return sheet


def _tile(item: Item, classes: ClassTable) -> Image.Image:
    """Image and label side by side."""
    image = ImageFile(item.image)
    label = read_train_ids(item, classes, image=image)
    height, width = image.size
    scale = min(_WIDTH / width, _HEIGHT / height)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    tile = Image.new("RGB", (2 * size[0], size[1]))
    tile.paste(Image.fromarray(image.read_colour()).resize(size), (0, 0))
    tile.paste(Image.fromarray(classes.palette[label]).resize(size, Image.Resampling.NEAREST), (size[0], 0))
    return tile


def legend(classes: Sequence[LabelClass], width: int) -> Image.Image:
    """The names of the classes beside their colours, in as many columns as fit."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    column = max(int(draw.textlength(name)) for name in [entry.name for entry in classes]) + 3 * _LINE
    columns = max(min(width // column, len(classes)), 1)
    picture = Image.new("RGB", (width, _LINE * -(-len(classes) // columns) + 4), "white")
    draw = ImageDraw.Draw(picture)
    for index, entry in enumerate(classes):
        y, x = _LINE * (index // columns) + 2, column * (index % columns) + 4
        draw.rectangle((x, y + 2, x + _LINE, y + _LINE - 3), fill=entry.colour, outline="black")
        draw.text((x + _LINE + 6, y + 1), entry.name, fill="black")
    return picture
