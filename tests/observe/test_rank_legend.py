"""The legend of the picture of all ranks: each colour where its word is."""

from lsys.observe.rank_heatmap import COLOURS, ranks_picture


def test_the_legend_has_each_part_in_its_column() -> None:
    parts = ["compute", "exposed_tensor", "imbalance", "bubble", "data", "other"]
    picture = ranks_picture([dict.fromkeys(parts, 0.1)], [0], "step 3")
    for number, part in enumerate(parts):  # four columns of 140 pixels; half a square from its corner
        row, column = 10 + 16 * (1 + number // 4) + 4 + 5, 10 + 140 * (number % 4) + 5
        assert tuple(picture[row, column]) == COLOURS[part], part
