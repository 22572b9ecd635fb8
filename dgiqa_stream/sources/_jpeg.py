"""Whether a JPEG is whole: FFmpeg fills what is missing with grey, and says so in its log only."""

from __future__ import annotations

_START_OF_IMAGE, _START_OF_SCAN, _END_OF_IMAGE = b"\xff\xd8", 0xDA, b"\xff\xd9"
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))  # TEM, RST0 to RST7 and SOI (ITU-T T.81, B.1.1.3)


def is_cut_short(data: bytes) -> bool:
    """Whether a JPEG's scans begin and its end marker never comes; what follows it is left alone.

    A thumbnail in the header has an end marker of its own, so headers are stepped over. In scans
    the marker cannot occur by chance: an 0xFF there is followed by 0 or a restart (T.81, B.1.1.5).
    """
    if not data.startswith(_START_OF_IMAGE):
        return False
    place = len(_START_OF_IMAGE)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _START_OF_SCAN:
            return data.find(_END_OF_IMAGE, place) < 0
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return False
