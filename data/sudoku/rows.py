"""
A language for sudokus: each row of the answer holds each digit once, and the clues are obeyed. Columns and
boxes are left to the network.

    python sample.py --ckpt out/sudoku --constraint data/sudoku/rows.py:rows --prompt "..3.1.........4."
"""


def rows(puzzle):
    """
    The automaton of a puzzle's answers: its start, its step from a state by a character, and where it may
    end. A state is how many cells are written, and the digits of the row so far.
    """
    side = int(len(puzzle) ** 0.5)
    digits = "123456789"[:side]

    def step(state, cell):
        i, row = state
        if i == len(puzzle) or cell not in digits or cell in row or puzzle[i] not in (".", cell):
            return None
        return i + 1, row | {cell} if len(row) + 1 < side else frozenset()

    return (0, frozenset()), step, lambda state: state[0] == len(puzzle)
