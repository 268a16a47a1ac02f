"""Samples: chats that hold images, read from whatever a user has."""

from ar_vlm.samples.pictures import Picture
from ar_vlm.samples.read import read_samples
from ar_vlm.samples.sample import Message, Sample

__all__ = ["Message", "Picture", "Sample", "read_samples"]
