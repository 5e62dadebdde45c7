"""Every measure of representational similarity as a function of a few sums over two Gram matrices.

For two representations of the same n samples let K, L (n x n) be their Gram matrices, k = K1 and l = L1 the row
sums, K~, L~ the matrices with zero diagonals and H = I - 11'/n. All measures below are built from bilinear forms

    B(K, L) = <K, L> + alpha <k, l> + beta (1'k)(1'l)

at (K, L), (K, K) and (L, L):

    | form       | on     | alpha    | beta             | gives                                                   |
    | ---------- | ------ | -------- | ---------------- | ------------------------------------------------------- |
    | HSIC_0     | K, L   | -2/n     | 1/n^2            | <HKH, HLH>: biased CKA, centred drift, rho               |
    | HSIC_1     | K~, L~ | -2/(n-2) | 1/((n-1)(n-2))   | n(n-3) times the unbiased estimator: debiased CKA        |
    | covariance | K~, L~ | 0        | -1/(n(n-1))      | covariance over the pairs i != j: RSA, r                 |

Sources: Kornblith et al. 2019 (CKA), Song et al. 2012 (HSIC_1), Nguyen et al. 2021 (HSIC_1 in CKA), Kriegeskorte
et al. 2008 (RSA), arXiv 2510.08852 (the drift of Theorem 1, the certificates of Corollaries 1 and 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from fastcl.errors import FastclError
from fastcl.similarity.sums.forms import ADDITIVE, CONSTANT, EQUAL, ROUNDING, Form, GramSums
from fastcl.theory.corollaries import cosine_floor, cosine_floor_tight


@dataclass(frozen=True, repr=False)
class PairStats:
    """Sufficient statistics of two Gram matrices K, L of the same n samples, and the measures they give.

    `full` and `hollow` hold the sums of K - shift_k 11' and L - shift_l 11' with and without the diagonals. Such a
    constant does not change CKA or RSA, and a drift undoes it; a shift near the mean entry of the matrix avoids the
    cancellation that features with a large mean would cause. What remains: with features m standard deviations from
    the origin, centred measures have relative rounding errors of about 1e-16 m^2.

    Equal models are exact: kl == kk == ll (bitwise) gives correlations of exactly 1.0 and drifts of exactly 0.0.

    Attributes:
        n: number of samples.
        kernel: "linear" (K = XX'), "cosine" (rows of X normalised) or another name.
        full: sums over all (i, j).
        hollow: sums over i != j.
        shift_k: constant that was subtracted from each entry of K.
        shift_l: the same for L.
        rounding: relative rounding error of the products behind the sums; 0 for float64 products.
        strains: for K and for L, the factor by which the sums may exceed that error, at least 1; larger if they were
            merged from parts with different pilots.

    Raises:
        FastclError: on n < 1 or sums that are not finite (features too large for float64).
    """

    n: int
    kernel: str
    full: GramSums
    hollow: GramSums
    shift_k: float = 0.0
    shift_l: float = 0.0
    rounding: float = 0.0
    strains: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def unpacked(
        cls, n: int, kernel: str, values: Sequence[float], rounding: float = 0.0,
        strains: tuple[float, float] = (1.0, 1.0),
    ) -> PairStats:  # fmt: skip
        """From 18 values: the sums of `full` and of `hollow`, each in the order of GramSums, then the two shifts."""
        return cls(n, kernel, GramSums(*values[:8]), GramSums(*values[8:16]), values[16], values[17], rounding, strains)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise FastclError(f"pair statistics need n >= 1 samples, got n={self.n}")
        self._check_sums()

    def _check_sums(self) -> None:
        # The unshifted sums must be finite too, since the drift is computed from them.
        shifts = (self.n * shift * self.n * shift for shift in (self.shift_k, self.shift_l))
        values = (*astuple(self.full), *astuple(self.hollow), *shifts)
        if not all(map(math.isfinite, values)):
            raise FastclError(
                f"sums of the {self.kernel} Gram matrices are not finite: features are not finite or too large for "
                f"float64; full={self.full}, hollow={self.hollow}"
            )

    def __repr__(self) -> str:
        """The measures, or "undefined", instead of the sums, which tell a reader little."""
        shown = []
        for name in ("cka", "cka_debiased", "rsa", "drift", "rho", "r"):
            try:
                shown.append(f"{name}={getattr(self, name):.6g}")
            except FastclError:
                shown.append(f"{name}=undefined")
        return f"PairStats(n={self.n}, kernel={self.kernel!r}, {', '.join(shown)})"

    @property
    def cka(self) -> float:
        """CKA with the biased HSIC_0, in [0, 1]; for kernel "linear" the linear CKA of Kornblith et al. 2019.

        Raises:
            FastclError: if a representation is constant over the samples (HKH = 0).
        """
        return self._hsic0().correlation(self._measure("CKA"), CONSTANT)

    @property
    def cka_debiased(self) -> float:
        """CKA with the unbiased HSIC_1 (Song et al. 2012, Nguyen et al. 2021), in [-1, 1]; it may be negative.

        Raises:
            FastclError: for n < 4, or if a self-term HSIC_1(K, K) is not positive.
        """
        return self._hsic1().correlation(self._measure("debiased CKA"), ADDITIVE)

    def hsic1(self) -> tuple[float, float, float]:
        """Unbiased HSIC_1 of (K, L), (K, K) and (L, L) (Song et al. 2012). Raises FastclError for n < 4."""
        return self.hsic1_form()[:3]

    def hsic1_form(self) -> Form:
        """`hsic1` with the rounding floors of (K, K) and (L, L). Raises FastclError for n < 4."""
        form, count = self._hsic1(), self.n * (self.n - 3)
        return Form(*(value / count for value in form))

    @property
    def rsa(self) -> float:
        """Pearson correlation of K_ij and L_ij over the pairs i != j, in [-1, 1].

        For kernel "cosine" this is the paper's RSA: Pearson between the cosine dissimilarities 1 - K_ij and 1 - L_ij
        (Kriegeskorte et al. 2008).

        Raises:
            FastclError: for n < 3, or if all off-diagonal entries of a matrix are equal.
        """
        return self._covariance().correlation(self._measure("RSA"), EQUAL)

    @property
    def drift(self) -> float:
        """||K - L||_F, the left side of Theorem 1 (arXiv 2510.08852).

        It is resolved to 1e-7 ||K - mean(K)||_F, or to sqrt(rounding) ||K - mean(K)||_F if that is more.
        """
        return math.sqrt(self._squared_distance(self.full, self.n * self.n))

    @property
    def drift_centered(self) -> float:
        """||HKH - HLH||_F, resolved like `drift`."""
        form = self._hsic0()
        return math.sqrt(max(0.0, (form.kk - form.kl) + (form.ll - form.kl)))

    @property
    def rho(self) -> float:
        """||HKH - HLH||_F / ||HKH||_F, so that cka >= (1 - rho) / (1 + rho) (Corollary 1, arXiv 2510.08852).

        Raises:
            FastclError: where `cka` does, so that the bound is defined exactly where `cka` is.
        """
        first, _ = self.centred_squares("rho")
        return self.drift_centered / math.sqrt(first)

    def centred_squares(self, measure: str) -> tuple[float, float]:
        """||HKH||_F^2 and ||HLH||_F^2. Raises FastclError, which names the measure, where `cka` is undefined."""
        return self._hsic0().self_terms(self._measure(measure), CONSTANT)

    @property
    def r(self) -> float:
        """||K~ - L~||_F divided by sqrt(n(n-1)) times the standard deviation of K_ij, i != j.

        With it rsa >= (1 - r) / (1 + r) (Corollary 2, arXiv 2510.08852, with both norms over the same set of pairs).

        Raises:
            FastclError: where `rsa` does, so that the bound is defined exactly where `rsa` is.
        """
        first, _ = self._covariance().self_terms(self._measure("r"), EQUAL)
        return math.sqrt(self._squared_distance(self.hollow, self.n * (self.n - 1)) / first)

    @property
    def cka_bound(self) -> float:
        """(1 - rho) / (1 + rho), a lower bound of CKA (Corollary 1, arXiv 2510.08852); 0 if rho >= 1.

        Raises:
            FastclError: as `rho`.
        """
        return max(0.0, cosine_floor(self.rho))

    @property
    def cka_bound_tight(self) -> float:
        """sqrt(1 - rho^2), a lower bound of CKA: the cosine of the largest angle that rho allows; 0 if rho >= 1.

        Raises:
            FastclError: as `rho`.
        """
        return max(0.0, cosine_floor_tight(self.rho))

    @property
    def rsa_bound(self) -> float:
        """(1 - r) / (1 + r), a lower bound of RSA (Corollary 2, arXiv 2510.08852); if r >= 1 it is -1, which is
        trivial.

        Raises:
            FastclError: as `r`.
        """
        return cosine_floor(self.r)

    @property
    def rsa_bound_tight(self) -> float:
        """sqrt(1 - r^2), a lower bound of RSA; -1 if r >= 1.

        Raises:
            FastclError: as `r`.
        """
        return cosine_floor_tight(self.r)

    def _hsic0(self) -> Form:
        return self._form(self.full, -2 / self.n, 1 / self.n**2)

    def _hsic1(self) -> Form:
        n = self.n
        if n < 4:
            raise FastclError(f"debiased CKA needs n >= 4 samples (HSIC_1 divides by n(n - 3)), got n={n}")
        return self._form(self.hollow, -2 / (n - 2), 1 / ((n - 1) * (n - 2)))

    def _covariance(self) -> Form:
        if self.n < 3:
            raise FastclError(f"RSA and r need n >= 3 samples (more than one pair), got n={self.n}")
        return self._form(self.hollow, 0.0, -1 / (self.n * (self.n - 1)))

    def _measure(self, name: str) -> str:
        return f"{name} ({self.kernel} kernel, n={self.n})"

    def _form(self, s: GramSums, alpha: float, beta: float) -> Form:
        def value(inner: float, rows: float, left: float, right: float) -> float:
            return inner + alpha * rows + (beta * left) * right

        def floor(which: str, rows: float, total: float, shift: float) -> float:
            # Hollow sums are full sums minus a diagonal and inherit the rounding errors of the full sums.
            full, hollow, full_rows, hollow_rows, full_total = self._self_sums(which)
            sums = full + abs(alpha) * rows + abs(beta * total) * abs(total)
            entries = self.n * ROUNDING * shift
            products = 0.0
            if self.rounding and s is self.hollow:
                # Products are less accurate than the sums. Centring removes the offset a that a row adds to all its
                # entries (its row mean); of the diagonal D + 2a only D comes from products.
                centred = full - 2 / self.n * full_rows + (full_total / self.n) ** 2
                margins, diagonal = full_rows / self.n**2, full - hollow
                mixed = (diagonal - hollow_rows - (4 - (self.n - 2) ** 2) * margins) / (2 * self.n)
                strain = self.strains[which == "l"]
                products = strain * self.rounding * (centred + max(0.0, diagonal - 4 * mixed - 4 * margins))
            return ROUNDING * sums + entries * entries + products

        return Form(
            kl=value(s.kl, s.row_kl, s.total_k, s.total_l),
            kk=value(s.kk, s.row_kk, s.total_k, s.total_k),
            ll=value(s.ll, s.row_ll, s.total_l, s.total_l),
            floor_k=floor("k", s.row_kk, s.total_k, self.shift_k),
            floor_l=floor("l", s.row_ll, s.total_l, self.shift_l),
        )

    def _self_sums(self, which: str) -> tuple[float, float, float, float, float]:
        """<K, K> and <k, k>, each with and without the diagonal, and 1'K1 (which="k"), or the same for L ("l")."""
        full, hollow = self.full, self.hollow
        if which == "k":
            return full.kk, hollow.kk, full.row_kk, hollow.row_kk, full.total_k
        return full.ll, hollow.ll, full.row_ll, hollow.row_ll, full.total_l

    def _squared_distance(self, s: GramSums, entries: int) -> float:
        """||K - L||_F^2 over `entries` pairs, with both shifts undone."""
        shift = self.shift_k - self.shift_l
        unshifted = (s.kk - s.kl) + (s.ll - s.kl) + 2 * shift * (s.total_k - s.total_l) + entries * shift * shift
        return max(0.0, unshifted)


@dataclass(frozen=True, repr=False)
class Overflown(PairStats):
    """Statistics whose sums are not finite. The measures raise, not the constructor, so that one overflowing pair of
    models does not stop the others."""

    def __post_init__(self) -> None:
        """Check nothing until a measure is requested."""

    def _form(self, s: GramSums, alpha: float, beta: float) -> Form:
        self._check_sums()
        return super()._form(s, alpha, beta)

    def _squared_distance(self, s: GramSums, entries: int) -> float:
        self._check_sums()
        return super()._squared_distance(s, entries)
