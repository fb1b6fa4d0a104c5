"""What becomes of a product's sums: numbers of some dtype, or silu(gate) * up of them."""

import dataclasses

from pallas_kernels.decode_step.common.phases import gated
from pallas_kernels.decode_step.packed.tile import M_TILE
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.packed_product.pieces import Piece, Shape


@dataclasses.dataclass(frozen=True)
class Outputs:
    """How a product's results are written.

    Attributes:
        dtype: of them.
        gated: whether they are silu(gate) * up of a product whose M-tiles hold outputs of both.
        scaled: whether each row's sums are multiplied with a number of the row before.
        arranged: rows of a block of the next product's input, in whose order they are written;
            0 for rows as they are.
    """

    dtype: str
    gated: bool = False
    scaled: bool = False
    arranged: int = 0

    def store(self, piece: Piece, y: V, scales: V, sums: list[V]) -> None:
        """Writes a warp's M-tile of a piece's rows."""
        m_tile = piece.first_m_tile + t.thread_id() // t.WARP
        first, inside = piece.row_block * piece.tiling.rows, m_tile < piece.shape.m_tiles
        for eight in range(piece.tiling.rows // 8):
            # Outputs g, g, g + 8 and g + 8 of rows 2 t, 2 t + 1, 2 t and 2 t + 1.
            four, row = sums[4 * eight : 4 * eight + 4], first + 8 * eight
            if self.gated:
                pair = self._gated(piece, row, scales, four)
                self._store(piece, y, row, m_tile * 8, pair, inside)
                continue
            apart = piece.shape.halves_apart
            height, further = (8, piece.shape.outs // 2) if apart else (M_TILE, 8)
            for half in range(2):
                column = m_tile * height + half * further
                self._store(piece, y, row, column, four[2 * half : 2 * half + 2], inside)

    def width(self, shape: Shape) -> int:
        """Numbers of a row."""
        return shape.outs // 2 if self.gated else shape.outs

    def result(self, shape: Shape, splits: int) -> tuple[int, ...]:
        """The shape of what is written."""
        if not self.arranged:
            return splits, shape.rows, self.width(shape)
        return 1, -(-shape.rows // self.arranged), self.arranged * self.width(shape)

    def _gated(self, piece: Piece, row: V, scales: V, four: list[V]) -> list[V]:
        """Of a lane's output, of its two rows of eight."""
        if self.scaled:
            last = piece.shape.rows - 1
            own = (t.smaller(row + t.thread_id() % 4 * 2 + n, last) for n in range(2))
            both = [t.load_global(scales + (each << 2).wide())[0].bits() for each in own]
            four = [x * by for x, by in zip(four, both * 2, strict=True)]
        return [gated(gate, up) for gate, up in zip(four[:2], four[2:], strict=True)]

    def _store(self, piece: Piece, y: V, row: V, column: V, pair: list[V], inside: V) -> None:
        """Writes eight outputs from a column on of eight rows, of which a lane has output g of rows
        2 t and 2 t + 1."""
        lane, width = t.thread_id() % t.WARP, self.width(piece.shape)
        g, two = lane // 4, lane % 4 * 2
        if self.dtype not in FORMATS:
            for n, value in enumerate(pair):
                at = self._place(piece, row + two + n, column + g)
                self._put(y + at * 4, value, inside & (row + two + n < piece.shape.rows))
            return
        # Outputs 2 t and 2 t + 1 of row g.
        both = t.transposed(FORMATS[self.dtype].pair(*pair))
        if self.arranged:
            at = self._arranged(row, g, column + two, width)
        else:
            at = self._place(piece, row + g, column + two)
        self._put(y + at * 2, both, inside & (row + g < piece.shape.rows))

    def _place(self, piece: Piece, row: V, column: V) -> V:
        split_row = piece.split * piece.shape.rows + row
        return split_row.wide() * self.width(piece.shape) + column.wide()

    def _arranged(self, eight: V, row: V, column: V, width: int) -> V:
        """Where a number lies in the next product's input (`many_rows.inputs`), of a row counted
        from a row that is a multiple of eight."""
        begin = (eight // self.arranged).wide() * (self.arranged * width)
        inside = column // 16 * (16 * self.arranged) + eight % self.arranged * 16
        return begin + (inside + column % 4 // 2 * 64 + row * 8 + column % 16 // 4 * 2).wide()

    def _put(self, at: V, value: V, there: V) -> None:
        t.when(there, lambda: t.store_global(at, [value]))
