"""How the fast forms cut rows into parts, one thread block each."""

TILE = 4096  # columns a block handles at once; TILE in csrc/select.cu too
BLOCKS_WANTED = 1024  # about eight for each multiprocessor of a large GPU


def segment_size(num_rows: int, num_columns: int) -> int:
    """Columns of a segment, whole tiles: enough segments to fill a GPU, no more than a row has tiles."""
    num_tiles = -(-num_columns // TILE)
    segments_wanted = -(-BLOCKS_WANTED // num_rows)
    return -(-num_tiles // segments_wanted) * TILE
