"""Reading and writing files, safely: whole or not at all, strangers' files checked."""
