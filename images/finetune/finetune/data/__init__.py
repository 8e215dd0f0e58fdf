"""Files to training records, without a model.

In reading order: `files` (find and decompress), `refusals` (what is not data), `encodings` (bytes to text), `dialects`,
`delimited`, `json_files`, `parquet` and `plain_text` (text to `rows`), `formats` (which of them), `recognise` (what the
columns mean), `chats` and `conversion` (rows to records), `dependencies`, `columns`, `template` and `tables` (rows of a
table to questions), `gather` (all files), `split` (duplicates, groups, validation), `load`, `report` and `check`.
"""

from finetune.data.load import load
from finetune.data.records import Dataset, Question, Record, RecordKind
from finetune.data.settings import DataSettings

__all__ = ["DataSettings", "Dataset", "Question", "Record", "RecordKind", "load"]
