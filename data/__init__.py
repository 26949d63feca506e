"""The training pictures, and the pictures of the user.

art.py          the drawings as training pictures with captions
scenes.py       what a picture shows, and the words for it
drawing.py      places, shapes and colours of drawings
styles.py       styles that have words
free_styles.py  styles that have none
paint.py        noise, blur and other image operations that both use
english.py      articles, plurals, synonyms
folder.py       a folder of your own captioned pictures
reading.py      any picture file as pixels
colour.py       what its colour values mean
metadata.py     what its metadata say
pictures.py     contact sheets
build.py        how the sprite sheets were made
"""

from .art import Art, kept_out_pairs, words
from .english import content_phrase, names
from .folder import Folder
from .reading import read_image, read_reference
from .scenes import Scene

__all__ = ["Art", "Folder", "Scene", "content_phrase", "kept_out_pairs", "names", "read_image",
           "read_reference", "words"]
