"""Reading examples: files, folders and hub data sets become `datasets.Dataset`s; columns get roles; rows are set aside.

sources    what a recipe names -> its parts            files      one file -> its rows; the readers by suffix
folders    the parts of a folder                       joined     shards, folders named after classes and values
media      images and recordings                       delimited  CSV and TSV
encoding   which bytes are which letters               json_rows  JSON and JSON Lines
columns    which column plays which role               other_text running text, CoNLL, fastText
labelled   the parts that can be used, and rows without a label      split  taking rows, setting rows aside
mix        several sets as one, each with its weight
"""

from adapters_kit.training.data.columns import recognise, unused
from adapters_kit.training.data.labelled import labelled, usable_parts
from adapters_kit.training.data.media import located, medium
from adapters_kit.training.data.mix import mixed
from adapters_kit.training.data.row_file import read_table
from adapters_kit.training.data.sources import Source, read, read_rows
from adapters_kit.training.data.split import Splits, in_both, split, take

__all__ = [
    "Source",
    "Splits",
    "in_both",
    "labelled",
    "located",
    "medium",
    "mixed",
    "read",
    "read_rows",
    "read_table",
    "recognise",
    "split",
    "take",
    "unused",
    "usable_parts",
]
