"""What rounding lets a pursuit tell apart; the same in all kernels. eps: of the kernel's type."""


def dependent(eps: float) -> float:
    """Distance of a unit atom from the span of the picks below which it depends on them."""
    return 4 * eps**0.5


def least_new(eps: float) -> float:
    """What the square of that distance counts as at the least where atoms compete by p² / distance².

    p and the distance carry some eps of rounding each, and what is divided by 1,024 eps is right to about a percent.
    Without the limit, atoms that all but depend on the picks win by rounding.
    """
    return 1024 * eps
