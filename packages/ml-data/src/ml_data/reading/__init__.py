r"""Input files to records: one process cuts files into chunks, any process parses a chunk.

| file | a record is |
|---|---|
| `.jsonl`; `.json` that begins with `{` | a line, which is an object |
| `.json` that begins with `[` | an item of the array, an object |
| `.txt`, `.md`, `.rst` | the file, or each line of it that is not blank: `{"text": ...}` |
| `.csv` | a row; the first row names the columns |
| `.parquet`, `.arrow` | a row |

The text forms may be compressed (`.gz`, `.zst`). Chunks follow from the files alone, so the result
does not depend on who parses them, and reading needs the memory of a few chunks. Lines end with
`\n` and nothing else: texts hold Unicode's other separators.

A record that cannot be used is a `Problem`, and reading goes on. A file that is damaged as a whole
(cut off, not what its name says) is a `UsageError`: nobody can say how many records it lost.
"""

from ml_data.reading.chunks import CHUNK_BYTES, TextDocument, read_chunks, records
from ml_data.reading.files import find_files
from ml_data.reading.record import Chunk, Record, text_of

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "Record",
    "TextDocument",
    "find_files",
    "read_chunks",
    "records",
    "text_of",
]
