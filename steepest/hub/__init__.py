"""`find` turns a model or data set that the user names into a folder on this machine. The hubs' clients are here too.

find.py         one function: local path, GGUF file, Hugging Face id, ModelScope id -> local folder
client.py       the interface of a hub's client, and the choice of one
huggingface.py  over huggingface_hub
modelscope.py   over modelscope_hub
files.py        files of a repository: patterns, checksums, room on the disk
receipts.py     records which downloads are complete and checked, so that a start needs neither network nor hashing
faults.py       the faults of a hub and their messages
"""

from steepest.hub.faults import Source
from steepest.hub.files import MODEL_FILES, TOKENIZER_FILES
from steepest.hub.find import Found, Pin, find, paths_of
from steepest.hub.local import local_model

__all__ = ["MODEL_FILES", "TOKENIZER_FILES", "Found", "Pin", "Source", "find", "local_model", "paths_of"]
