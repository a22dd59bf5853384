"""Tables from parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lora_ggpo.data.spool import PIECE, spooled_table
from lora_ggpo.data.table import Table, refuse_repeated
from lora_ggpo.errors import UserError, first_line


def read_parquet(path: Path, source: pyarrow.NativeFile) -> Table:
    """Return the rows of a parquet file, with the class names if `datasets` wrote it; what is long goes to files."""
    try:
        file = pyarrow.parquet.ParquetFile(source)
        schema = file.schema_arrow
        refuse_repeated(path, schema.names)
        table = spooled_table(chain([schema.empty_table()], _pieces(file)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)}); write it again.") from None
    return Table.of_arrow(table.replace_schema_metadata(schema.metadata), str(path))


def _pieces(file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.Table]:
    for batch in file.iter_batches(PIECE):
        batch.validate(full=True)
        yield pyarrow.Table.from_batches([batch])
