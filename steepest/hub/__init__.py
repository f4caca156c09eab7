"""What a user writes as a model or a data set becomes a folder on this machine: `find`. The hubs' clients live here.

find.py         one function: local path, GGUF file, Hugging Face id, ModelScope id -> local folder
client.py       what a hub's client has to offer, and who offers it
huggingface.py  over huggingface_hub
modelscope.py   over modelscope_hub
files.py        files of a repository: patterns, checksums, room on the disk
receipts.py     which downloads are whole and checked, so that a start needs neither network nor hashing
faults.py       what can go wrong, in words
"""

from steepest.hub.faults import Source
from steepest.hub.files import MODEL_FILES, TOKENIZER_FILES
from steepest.hub.find import Found, Pin, find
from steepest.hub.local import local_model

__all__ = ["MODEL_FILES", "TOKENIZER_FILES", "Found", "Pin", "Source", "find", "local_model"]
