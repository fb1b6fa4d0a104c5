"""Operations in float64, how far a correct engine may be from them, and local replay."""
