"""One control step of a small MuJoCo model as straight-line JAX arithmetic.

    step = make_step(mujoco.MjModel.from_xml_string(xml), substeps=10)
    qpos, qvel, touch = jax.vmap(step)(qpos, qvel, ctrl)

A general simulator spends most of its time on loops over bodies, gathers, masked rows and hundreds of small
kernels, none of which a small model needs. Here the compiled `mujoco.MjModel` is known when JAX traces, so the
step is *partially evaluated*. Every quantity is a numpy object array whose entries are Python floats (constants)
or `Traced`s (one traced scalar each). The operators of `Traced` fold constants and drop 0 and 1. Ordinary 3-D
rigid-body algebra then leaves only the arithmetic that this model needs: a planar mechanism becomes planar code.
XLA fuses that code, and `vmap` adds the batch. Given numbers only, the same code is an ordinary simulator that
runs while tracing (see `merge_copies`).

The semantics are those of C MuJoCo (Todorov, Erez & Tassa 2012, and the "Computation" chapter of its manual),
with the model's own integrator, time step and friction cone. Its solver, iterations and tolerance are not read:
constraints are always solved to the end.

    kinematics   one pass down the tree gives poses and velocity-product accelerations of all bodies
    dynamics     M a0 = tau(q, v, u): M and the bias force are sums over bodies of Jacobian products
    constraints  limits, friction loss, tendon limits and planar contacts become rows x = J a - aref
    solver       min_a 1/2 (a - a0)' M (a - a0) + sum of s(x): closed form for a lone row, else Newton
    integrator   semi-implicit Euler with implicit joint damping, or RK4

Contacts of capsules with parallel or crossing axes differ from C's: see contact_geometry.

A model with any other feature raises `NotImplementedError`. `backend="mjx"`, MuJoCo's JAX port, covers more.
"""
import copy
import math
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jax import lax
from mujoco import mjMAXIMP, mjMINIMP, mjMINVAL

SLIDE, HINGE = int(mujoco.mjtJoint.mjJNT_SLIDE), int(mujoco.mjtJoint.mjJNT_HINGE)
GEOM, INTEGRATOR, WRAP, TRN = mujoco.mjtGeom, mujoco.mjtIntegrator, mujoco.mjtWrap, mujoco.mjtTrn
PLANE, SPHERE, CAPSULE = int(GEOM.mjGEOM_PLANE), int(GEOM.mjGEOM_SPHERE), int(GEOM.mjGEOM_CAPSULE)


def disabled(m, name):
    """Whether a part of the physics is disabled in the model's option flags."""
    return bool(m.opt.disableflags & int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{name}")))


def actuator_disabled(m, i):
    """Whether actuator `i` is in a group that the model's options disable: only groups 0 to 30 can be."""
    group = int(m.actuator_group[i])
    return 0 <= group <= 30 and bool(m.opt.disableactuator >> group & 1)


# ---- Partial evaluation: constant and traced scalars -------------------------------------------------------
class Traced:
    """A traced scalar `x` (float or bool) of a computation whose float dtype is `dtype`.

    Operations with Python floats are simplified: x + 0, x * 0, x * 1, x * -1 and x / 1 cost nothing.
    """
    __slots__ = ("x", "dtype")

    def __init__(self, x, dtype=None):
        self.x, self.dtype = x, dtype or x.dtype

    def _binary(self, op, other, swap=False):
        if isinstance(other, np.ndarray):
            return NotImplemented  # numpy then applies the operator to each entry
        y = unwrap(other, self.dtype)
        return Traced(op(y, self.x) if swap else op(self.x, y), self.dtype)

    def __add__(self, other):
        return self if known(other, 0) else self._binary(lax.add, other)

    def __sub__(self, other):
        return self if known(other, 0) else self._binary(lax.sub, other)

    def __rsub__(self, other):
        return -self if known(other, 0) else self._binary(lax.sub, other, swap=True)

    def __mul__(self, other):
        if known(other, 0):
            return 0.0
        if known(other, 1):
            return self
        return -self if known(other, -1) else self._binary(lax.mul, other)

    def __truediv__(self, other):
        return self * (1.0 / other) if known(other) else self._binary(lax.div, other)

    def __rtruediv__(self, other):
        return 0.0 if known(other, 0) else self._binary(lax.div, other, swap=True)

    def __neg__(self):
        return Traced(lax.neg(self.x), self.dtype)

    def __lt__(self, other):
        return self._binary(lax.lt, other)

    def __gt__(self, other):
        return self._binary(lax.gt, other)

    def __le__(self, other):
        return self._binary(lax.le, other)

    def __and__(self, other):
        return self._binary(lax.bitwise_and, other)

    def __or__(self, other):
        return self._binary(lax.bitwise_or, other)

    __radd__, __rmul__ = __add__, __mul__


def known(a, value=None):
    """Whether `a` is a constant (equal to `value`, if given)."""
    return not isinstance(a, (Traced, np.ndarray)) and (value is None or a == value)


def unwrap(a, dtype):
    return a.x if isinstance(a, Traced) else np.asarray(a, dtype)[()]


def scalars(array, dtype):
    return [Traced(array[i].astype(dtype)) for i in range(array.shape[0])]


def const(a):
    """Model constants as an object array. Rounding errors around integers are removed, so that 0 and 1 fold."""
    a = np.asarray(a, float)
    return np.where(np.abs(a - np.round(a)) < 1e-12, np.round(a), a).astype(object)


def zeros(*shape):
    return np.full(shape, 0.0, object)


def _unary(fn, lax_fn):
    return lambda a: fn(a) if known(a) else Traced(lax_fn(a.x), a.dtype)


sin, cos, sqrt = _unary(math.sin, lax.sin), _unary(math.cos, lax.cos), _unary(math.sqrt, lax.sqrt)


def _pairwise(fn, lax_fn):
    def apply(a, b):
        if known(a) and known(b):
            return fn(a, b)
        if known(a) or known(b):  # an infinite bound is no bound
            c, other = (a, b) if known(a) else (b, a)
            if math.isinf(c) and fn(c, 0.0) == 0.0:
                return other
        return a._binary(lax_fn, b) if isinstance(a, Traced) else b._binary(lax_fn, a)
    return apply


minimum, maximum = _pairwise(min, lax.min), _pairwise(max, lax.max)


def clip(a, lo, hi):
    return minimum(maximum(a, lo), hi)


def where(condition, a, b):
    if known(condition):
        return a if condition else b
    dtype = condition.dtype
    x, y = (jnp.asarray(unwrap(c, dtype), dtype) for c in (a, b))
    return Traced(lax.select(condition.x, x, y), dtype)


def dot(a, b):
    return sum((x * y for x, y in zip(a, b)), 0.0)


def cross(a, b):
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]], object)


def power(x, p):
    return x if p == 1 else x * x if p == 2 else Traced(lax.pow(x.x, unwrap(p, x.dtype)), x.dtype)


def fusion_barrier(values):
    """The same values (object array), computed once.

    XLA's CPU fusion repeats cheap shared work in every consumer, but never a division. A division by a 1 that
    XLA cannot simplify (0 x + 1) ends the fusion here. It made cartpole 5 times faster, most other tasks twice.
    """
    values = np.asarray(values, object)
    traced = [v for v in np.ravel(values) if not known(v)]
    if not traced:
        return values
    one = Traced(traced[0].x * 0 + 1)
    return np.vectorize(lambda v: v if known(v) else v / one, otypes=[object])(values)


def factor(M):
    """L' D L of a symmetric positive matrix, from the last row up, which preserves the zeros of a tree."""
    M, n = M.copy(), len(M)
    inverse = [None] * n
    L = zeros(n, n)
    for k in reversed(range(n)):
        inverse[k] = 1.0 / M[k, k]
        for i in range(k):
            L[k, i] = M[k, i] * inverse[k]
        for i in range(k):
            for j in range(i + 1):
                M[i, j] = M[i, j] - L[k, i] * M[k, j]
    return L, inverse


def solve(factors, b):
    L, inverse = factors
    x = list(b)
    for k in reversed(range(len(x))):
        for i in range(k):
            x[i] = x[i] - L[k, i] * x[k]
    for k in range(len(x)):
        x[k] = x[k] * inverse[k] - sum((L[k, i] * x[i] for i in range(k)), 0.0)
    return np.array(x, object)


# ---- Rigid bodies ------------------------------------------------------------------------------------------
def rotation(quat):
    mat = np.zeros(9)
    mujoco.mju_quat2Mat(mat, np.asarray(quat, float))
    return const(mat.reshape(3, 3))


class Tree(NamedTuple):
    """World-frame pose of each body, its velocity-product motion if velocities are given, axes of each dof."""
    pos: list        # (3,) body origin
    mat: list        # (3, 3) body orientation
    omega: list      # (3,) angular velocity
    alpha: list      # (3,) angular acceleration at zero joint acceleration
    acc: list        # (3,) linear acceleration of the origin at zero joint acceleration, gravity subtracted
    axis: list       # (3,) axis of each dof
    anchor: list     # (3,) point on the axis of a hinge; None for a slide
    dofs: list       # dofs that move each body

    def jacobian(self, body, point):
        """{dof: (3,) velocity of a world `point` fixed to `body`, per unit joint velocity}."""
        return {d: self.axis[d] if self.anchor[d] is None else cross(self.axis[d], point - self.anchor[d])
                for d in self.dofs[body]}


def forward_tree(m, q, v=None):
    """`Tree` at joint positions `q` (nq,) and velocities `v` (nv,). With v = None the motion is zero."""
    pos, mat, dofs = [const([0, 0, 0])], [const(np.eye(3))], [[]]
    omega, alpha, acc = [zeros(3)], [zeros(3)], [const([0, 0, 0] if disabled(m, "GRAVITY") else -m.opt.gravity)]
    axes, anchors = [None] * m.nv, [None] * m.nv

    def centripetal(w, dw, r):
        return cross(dw, r) + cross(w, cross(w, r))

    for b in range(1, m.nbody):
        parent = m.body_parentid[b]
        w, dw, R = omega[parent], alpha[parent], mat[parent]
        offset = R @ const(m.body_pos[b])
        p, a = pos[parent] + offset, acc[parent] + centripetal(w, dw, offset)
        R = R @ rotation(m.body_quat[b])
        moved = list(dofs[parent])
        for j in range(m.body_jntadr[b], m.body_jntadr[b] + m.body_jntnum[b]):
            d, local = m.jnt_dofadr[j], const(m.jnt_axis[j])
            angle = q[m.jnt_qposadr[j]] - float(m.qpos0[m.jnt_qposadr[j]])
            rate = 0.0 if v is None else v[d]
            axes[d] = R @ local
            moved.append(d)
            if m.jnt_type[j] == SLIDE:
                p, shift = p + axes[d] * angle, axes[d] * angle
                a = a + centripetal(w, dw, shift) + 2.0 * cross(w, axes[d] * rate)
                continue
            arm = R @ const(m.jnt_pos[j])  # origin to anchor, before and after the rotation
            anchors[d] = p + arm
            a = a + centripetal(w, dw, arm)
            s, c = sin(angle), cos(angle)
            outer = const(np.outer(m.jnt_axis[j], m.jnt_axis[j]))
            skew = const(np.cross(np.eye(3), m.jnt_axis[j]))
            R = R @ (const(np.eye(3) - outer.astype(float)) * c + outer + skew * s)
            dw, w = dw + cross(w, axes[d] * rate), w + axes[d] * rate
            arm = R @ const(m.jnt_pos[j])
            p, a = anchors[d] - arm, a - centripetal(w, dw, arm)
        p, R, w, dw, a = (fusion_barrier(x) for x in (p, R, w, dw, a))  # all later code uses them
        for values, value in zip((pos, mat, omega, alpha, acc, dofs), (p, R, w, dw, a, moved)):
            values.append(value)
    return Tree(pos, mat, omega, alpha, acc, axes, anchors, dofs)


def centres_of_mass(m, tree):
    return [tree.pos[b] + tree.mat[b] @ const(m.body_ipos[b]) for b in range(m.nbody)]


def inertia_and_bias(m, tree):
    """Mass matrix (nv, nv), and the force (nv,) at zero joint acceleration (gravity, centrifugal)."""
    M, bias = zeros(m.nv, m.nv), zeros(m.nv)
    for d in range(m.nv):
        M[d, d] = float(m.dof_armature[d])
    for b in range(1, m.nbody):
        if not tree.dofs[b] or not (m.body_mass[b] or m.body_inertia[b].any()):
            continue
        mass, inertia = float(m.body_mass[b]), m.body_inertia[b].astype(object)
        arm, frame = tree.mat[b] @ const(m.body_ipos[b]), tree.mat[b] @ rotation(m.body_iquat[b])
        w, dw = tree.omega[b], tree.alpha[b]
        force = (tree.acc[b] + cross(dw, arm) + cross(w, cross(w, arm))) * mass
        w, dw = frame.T @ w, frame.T @ dw
        torque = inertia * dw + cross(w, inertia * w)
        linear = tree.jacobian(b, tree.pos[b] + arm)
        angular = {d: zeros(3) if tree.anchor[d] is None else frame.T @ tree.axis[d] for d in linear}
        for i in linear:
            bias[i] = bias[i] + dot(linear[i], force) + dot(angular[i], torque)
            for j in linear:
                if j <= i:
                    spin = dot(angular[i], inertia * angular[j])
                    M[i, j] = M[j, i] = M[i, j] + dot(linear[i], linear[j]) * mass + spin
    return M, bias


def tendon(m, tree, q, t, wrap_prm):
    """Length and Jacobian {dof: value} of tendon `t`: fixed (of joints) or straight from site to site."""
    wraps = range(m.tendon_adr[t], m.tendon_adr[t] + m.tendon_num[t])
    length, J = 0.0, {}
    if m.wrap_type[wraps[0]] == WRAP.mjWRAP_JOINT:
        for w in wraps:
            j = m.wrap_objid[w]
            length = length + wrap_prm[w] * q[m.jnt_qposadr[j]]
            J[m.jnt_dofadr[j]] = wrap_prm[w] + J.get(m.jnt_dofadr[j], 0.0)
        return length, J
    sites = [m.wrap_objid[w] for w in wraps]
    for s0, s1 in zip(sites, sites[1:]):
        (p0, p1), (b0, b1) = ([site_position(m, tree, s) for s in (s0, s1)], m.site_bodyid[[s0, s1]])
        distance = sqrt(dot(p1 - p0, p1 - p0))
        if known(distance):
            length = length + distance
            continue
        direction = (p1 - p0) * where(distance < mjMINVAL, 0.0, 1.0 / distance)
        length = length + distance
        for d, value in relative_jacobian(tree, (b0, p0), (b1, p1), direction).items():
            J[d] = value + J.get(d, 0.0)
    return length, J


def site_position(m, tree, site):
    b = m.site_bodyid[site]
    return tree.pos[b] + tree.mat[b] @ const(m.site_pos[site])


def relative_jacobian(tree, end1, end2, direction):
    """{dof: velocity of end 2 relative to end 1 along `direction`}; an end is (body, world point)."""
    J = {}
    for (body, p), sign in ((end1, -1.0), (end2, 1.0)):
        for d, column in tree.jacobian(body, p).items():
            J[d] = J.get(d, 0.0) + sign * dot(column, direction)
    return J


# ---- Constraints -------------------------------------------------------------------------------------------
class Group(NamedTuple):
    """Constraints on the same coordinates y = T a: one scalar, or the relative planar twist of two bodies."""
    T: list           # of {dof: coefficient}
    members: list     # of `Row` or `Contact`, whose J multiplies y

    def coordinates(self, a):
        return [dot(t.values(), [a[d] for d in t]) for t in self.T]


class Row(NamedTuple):
    """A scalar constraint x = J a - aref whose cost has the gradient clip(D x, lo, hi)."""
    J: tuple          # of one row: (1.0,)
    aref: tuple       # of one
    D: object         # 1/R; zero when inactive
    lo: float
    hi: float

    def gradient(self, x):
        return (clip(self.D * x[0], self.lo, self.hi),)

    def hessian(self, x):
        y = self.D * x[0]
        inside = y < self.hi if self.lo == -math.inf else (y < self.hi) & (y > self.lo)
        return ((where(inside, self.D, 0.0),),)


class Contact(NamedTuple):
    """A planar contact: normal and tangent row, friction coefficient `mu`, D = 1/R of the normal row."""
    J: tuple          # of two rows over the coordinates of the group
    aref: tuple       # of two
    D: object         # zero when apart
    mu: float
    impratio: float
    elliptic: bool
    zone: dict        # {touch sensor: 0/1 Traced}, whether the sensor measures the contact's normal force

    def gradient(self, x):
        """Gradient W x: the cost is piecewise quadratic, and W is the Hessian of the piece that contains x."""
        (wnn, wnt), (_, wtt) = self.hessian(x)
        return wnn * x[0] + wnt * x[1], wnt * x[0] + wtt * x[1]

    def hessian(self, x):
        (n, t), mu, D = x, self.mu, self.D
        if self.elliptic:
            mu2 = mu * mu / self.impratio
            size = maximum(t, -t) * mu
            bottom, middle = n * mu2 + size < 0.0, n < size
            c = where(middle, D / (1.0 + mu2), 0.0)
            sign = where(t < 0.0, -mu, mu)
            return ((where(bottom, D, c), where(bottom, 0.0, -(c * sign))),
                    (where(bottom, 0.0, -(c * sign)), where(bottom, D * self.impratio, c * (mu * mu))))
        # MuJoCo's pyramid has four edges. The two along y have the same row n, so n counts twice here.
        low, high = (where(n + s * t < 0.0, D, 0.0) for s in (mu, -mu))
        return ((low + high + where(n < 0.0, D * 2.0, 0.0), (low - high) * mu),
                ((low - high) * mu, (low + high) * (mu * mu)))


def impedance(m, solref, solimp, position, weight):
    """MuJoCo's soft-constraint parameters ("Computation: constraint model" in its manual).

    Args:
      m: model, for its time step.
      solref: (2,) time constant and damping ratio, or minus stiffness and minus damping.
      solimp: (5,) impedance d0, d1, width, midpoint, power.
      position: distance to the constraint minus its margin, negative when violated; a constant 0 for friction loss.
      weight: diagonal of J M^-1 J', as estimated by MuJoCo's invweight0.

    Returns:
      (D, B, K d): inverse regularisation D = 1/R; reference acceleration aref = -B (J v) - (K d) position.
    """
    d0, d1 = np.clip(solimp[:2], mjMINIMP, mjMAXIMP)
    width, mid, p = max(0.0, solimp[2]), float(np.clip(solimp[3], mjMINIMP, mjMAXIMP)), max(1.0, solimp[4])
    d0, d1 = float(d0), float(d1)
    if solref[0] > 0 and solref[1] > 0:
        time = max(float(solref[0]), 2 * m.opt.timestep)
        K, B = 1.0 / max(mjMINVAL, (d1 * time * float(solref[1])) ** 2), 2.0 / max(mjMINVAL, d1 * time)
    else:
        K, B = -float(solref[0]) / max(mjMINVAL, d1 * d1), -float(solref[1]) / max(mjMINVAL, d1)
    if d0 == d1 or width <= mjMINVAL:
        d = 0.5 * (d0 + d1)
    elif known(position):
        d = d0  # friction loss: always at zero
    else:
        x = minimum(maximum(position, -position) / width, 1.0)
        y = x if p == 1 else where(x < mid, power(x, p) / mid ** (p - 1),
                                   1.0 - power(1.0 - x, p) / (1.0 - mid) ** (p - 1))
        d = d0 + y * (d1 - d0)
    weight = max(weight, mjMINVAL)
    D = d / ((1.0 - d) * weight)
    return D, B, K * d


def scalar_rows(m, tree, q, v, wrap_prm):
    """Friction loss, joint limits and tendon limits as groups of one `Row`."""
    groups = []
    if not disabled(m, "FRICTIONLOSS"):
        for d in np.flatnonzero(m.dof_frictionloss > 0):
            D, B, _ = impedance(m, m.dof_solref[d], m.dof_solimp[d], 0.0, float(m.dof_invweight0[d]))
            loss = float(m.dof_frictionloss[d])
            groups.append(Group([{d: 1.0}], [Row(((1.0,),), (-B * v[d],), D, -loss, loss)]))
    if disabled(m, "LIMIT"):
        return groups

    def limit(value, J, bounds, margin, solref, solimp, weight, only_upper=False):
        """One row for the nearer of the two bounds: they cannot both be violated."""
        lower, upper = value - float(bounds[0]), float(bounds[1]) - value
        side = -1.0 if only_upper else where(lower < upper, 1.0, -1.0)
        position = (upper if only_upper else minimum(lower, upper)) - margin
        D, B, Kd = impedance(m, solref, solimp, position, weight)
        J = {d: side * c for d, c in J.items() if not known(c, 0)}
        aref = -B * dot(J.values(), [v[d] for d in J]) - Kd * position
        D = where(position < 0.0, D, 0.0)
        groups.append(Group([J], [Row(((1.0,),), (aref,), D, -math.inf, 0.0)]))

    for j in np.flatnonzero(m.jnt_limited):
        d = m.jnt_dofadr[j]
        limit(q[m.jnt_qposadr[j]], {d: 1.0}, m.jnt_range[j], float(m.jnt_margin[j]),
              m.jnt_solref[j], m.jnt_solimp[j], float(m.dof_invweight0[d]))
    for t in np.flatnonzero(m.tendon_limited):
        length, J = tendon(m, tree, q, t, wrap_prm)
        string = m.wrap_type[m.tendon_adr[t]] == WRAP.mjWRAP_SITE and m.tendon_range[t, 0] <= 0
        limit(length, J, m.tendon_range[t], float(m.tendon_margin[t]), m.tendon_solref_lim[t],
              m.tendon_solimp_lim[t], float(m.tendon_invweight0[t]), only_upper=string)
    return groups


# ---- Contacts ----------------------------------------------------------------------------------------------
def contact_pairs(m):
    """Geom pairs that pass MuJoCo's collision filters, less those that touch at no joint positions."""
    if disabled(m, "CONTACT") or disabled(m, "CONSTRAINT"):
        return []
    data = mujoco.MjData(m)
    mujoco.mj_kinematics(m, data)
    weld, body = m.body_weldid, m.geom_bodyid
    parent = weld[m.body_parentid[weld]]
    discs = [reach_disc(m, data, g) for g in range(m.ngeom)]
    pairs = []
    for g1, g2 in ((i, j) for i in range(m.ngeom) for j in range(i + 1, m.ngeom)):
        w1, w2 = weld[body[g1]], weld[body[g2]]
        family = w1 and w2 and (parent[w1] == w2 or parent[w2] == w1) and not disabled(m, "FILTERPARENT")
        masks = m.geom_contype[g1] & m.geom_conaffinity[g2] or m.geom_contype[g2] & m.geom_conaffinity[g1]
        if not masks or w1 == w2 or family or (body[g1] << 16) + body[g2] in m.exclude_signature:
            continue
        if m.geom_type[g1] > m.geom_type[g2]:
            g1, g2 = g2, g1
        (c1, r1), (c2, r2) = discs[g1], discs[g2]
        apart = np.linalg.norm((c1 - c2)[[0, 2]]) - r1 - r2
        if m.geom_type[g1] == PLANE:
            normal = data.geom_xmat[g1].reshape(3, 3)[:, 2]
            still = weld[body[g1]] == 0 and abs(normal[1]) < 1e-12
            apart = (c2 - data.geom_xpos[g1]) @ normal - r2 if still else -math.inf
        if apart <= m.geom_margin[g1] + m.geom_margin[g2]:
            pairs.append((g1, g2))
    return pairs


def reach_disc(m, data, g):
    """(centre (3,), radius) of a disc that contains geom `g`, projected on the x-z plane, at all joint positions.

    Up the tree, a hinge along y rotates the disc about the hinge's anchor, so a disc around the anchor that
    contains it is invariant. With any other joint the radius is infinite, since limits are soft. `data` is at
    qpos0.
    """
    centre, size = data.geom_xpos[g], m.geom_size[g]
    if m.geom_type[g] in (SPHERE, CAPSULE, int(GEOM.mjGEOM_CYLINDER)):
        axis = np.linalg.norm(data.geom_xmat[g].reshape(3, 3)[[0, 2], 2])  # in-plane part of the z axis
        radius = size[0] + (0.0 if m.geom_type[g] == SPHERE else size[1] * axis)
    else:
        radius = m.geom_rbound[g] or math.inf
    for j in joints_above(m, m.geom_bodyid[g]):
        if m.jnt_type[j] == SLIDE or abs(data.xaxis[j, 1]) < 1 - 1e-12:
            return centre, math.inf
        radius += np.linalg.norm((centre - data.xanchor[j])[[0, 2]])
        centre = data.xanchor[j]
    return centre, radius


def joints_above(m, body):
    """Joints that move `body`, from the nearest to the root."""
    while body:
        yield from reversed(range(m.body_jntadr[body], m.body_jntadr[body] + m.body_jntnum[body]))
        body = m.body_parentid[body]


def contact_geometry(m, tree, g1, g2):
    """[(distance, normal from geom 1 to 2 (3,), midpoint (3,))]: one entry, two for a plane and a capsule.

    Two capsules differ from C in two cases. If their axes cross, no direction in the plane is the normal: C uses y,
    which gives friction along x and z and no normal force in the plane; here the normal comes from rounding errors,
    or is x. If their axes are parallel, C may make two contacts; here there is one.
    """
    def pose(g):
        b = m.geom_bodyid[g]
        axis = tree.mat[b] @ rotation(m.geom_quat[g])[:, 2]
        return tree.pos[b] + tree.mat[b] @ const(m.geom_pos[g]), axis, float(m.geom_size[g, 0])

    (p1, z1, r1), (p2, z2, r2) = pose(g1), pose(g2)
    kinds = m.geom_type[g1], m.geom_type[g2]
    s1, s2 = z1 * float(m.geom_size[g1, 1]), z2 * float(m.geom_size[g2, 1])  # half segments of capsules
    if kinds[0] == PLANE:
        ends = [p2] if kinds[1] == SPHERE else [p2 + s2, p2 - s2]
        distances = [dot(p - p1, z1) - r2 for p in ends]
        return [(x, z1, p - z1 * (r2 + 0.5 * x)) for x, p in zip(distances, ends)]
    if kinds == (SPHERE, CAPSULE):
        half = float(m.geom_size[g2, 1])
        p2 = p2 + z2 * clip(dot(z2, p1 - p2), -half, half)
    elif kinds == (CAPSULE, CAPSULE):  # where the lines cross, clipped to segment 1, then 2, then 1 again
        gap, area = p1 - p2, cross(s1, s2)[1]
        area = where(maximum(area, -area) < 3e-8, 3e-8, area)
        aa, ab, bb = float(m.geom_size[g1, 1]) ** 2, dot(s1, s2), float(m.geom_size[g2, 1]) ** 2
        x1 = clip(-cross(gap, s2)[1] / area, -1.0, 1.0)
        x2 = clip((dot(s2, gap) + ab * x1) / bb, -1.0, 1.0)
        x1 = clip((ab * x2 - dot(s1, gap)) / aa, -1.0, 1.0)
        p1, p2 = p1 + s1 * x1, p2 + s2 * x2
    offset = p2 - p1
    length = sqrt(dot(offset, offset))
    same = length < mjMINVAL
    inverse = 1.0 / where(same, 1.0, length)
    normal = offset * inverse
    normal[0] = where(same, 1.0, normal[0])
    distance = length - (r1 + r2)
    return [(distance, normal, p1 + normal * (r1 + 0.5 * distance))]


def merge_copies(m, pairs, touch):
    """{pair: number of copies of each of its contacts}. A contact counts its equals, which then have 0 copies.

    If bodies only translate, several capsule ends over a plane always have the same height: of the ten contacts of
    this kind in ball_in_cup three remain. They are found by running `contact_geometry` on numbers.
    """
    copies, first = {pair: [1, 1] for pair in pairs}, {}
    if (m.jnt_type == HINGE).any() or len(touch):
        return copies
    rng = np.random.RandomState(0)
    trees = [forward_tree(m, rng.uniform(-2, 2, m.nq)) for _ in range(3)]
    for pair in (pair for pair in pairs if m.geom_type[pair[0]] == PLANE):
        parameters = np.hstack([m.geom_bodyid[list(pair)], *contact_parameters(m, *pair)])
        for k, contacts in enumerate(zip(*(contact_geometry(m, tree, *pair) for tree in trees))):
            numbers = np.hstack([np.hstack(c[:2]).astype(float) for c in contacts])
            other, i = first.setdefault(tuple(np.round([*parameters, *numbers], 10)), (pair, k))
            if (other, i) != (pair, k):
                copies[pair][k] = 0
                copies[other][i] += 1
    return copies


def contact_parameters(m, g1, g2):
    """MuJoCo's mixing of two geoms: (friction, solref, solimp, margin)."""
    margin = float(m.geom_margin[g1] + m.geom_margin[g2])
    if m.geom_priority[g1] != m.geom_priority[g2]:
        g = g1 if m.geom_priority[g1] > m.geom_priority[g2] else g2
        return float(m.geom_friction[g, 0]), m.geom_solref[g], m.geom_solimp[g], margin
    (w1, w2), ref = m.geom_solmix[[g1, g2]], m.geom_solref[[g1, g2]]
    mix = w1 / (w1 + w2) if min(w1, w2) >= mjMINVAL else 0.5 if max(w1, w2) < mjMINVAL else float(w1 >= mjMINVAL)
    solref = mix * ref[0] + (1 - mix) * ref[1] if (ref[:, 0] > 0).all() else ref.min(axis=0)
    solimp = mix * m.geom_solimp[g1] + (1 - mix) * m.geom_solimp[g2]
    return float(max(m.geom_friction[[g1, g2], 0])), solref, solimp, margin


def contact_rows(m, tree, v, pairs, touch):
    """Groups of `Contact`s, one per pair of bodies; `touch` lists the sites of the touch sensors."""
    groups = {}
    elliptic = m.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    for (g1, g2), copies in pairs.items():
        mu, solref, solimp, margin = contact_parameters(m, g1, g2)
        b1, b2 = m.geom_bodyid[[g1, g2]]
        origin = tree.pos[b2 if tree.dofs[b2] else b1]
        if (b1, b2) not in groups:
            groups[b1, b2] = Group(relative_twist(tree, b1, b2, origin), [])
        group = groups[b1, b2]
        rate = fusion_barrier(group.coordinates(v))
        weight = float(m.body_invweight0[b1, 0] + m.body_invweight0[b2, 0])
        if not elliptic:
            weight *= (1 + mu * mu) * 2 * mu * mu / m.opt.impratio
        for (distance, normal, p), count in zip(contact_geometry(m, tree, g1, g2), copies):
            if not count:
                continue
            D, B, Kd = impedance(m, solref, solimp, distance - margin, weight)
            tangent, arm = np.array([-normal[2], 0.0, normal[0]], object), p - origin
            J = tuple((d[0], d[2], d[0] * arm[2] - d[2] * arm[0]) for d in (normal, tangent))
            aref = [-B * dot(j, rate) for j in J]
            zone = {}
            for k, site in enumerate(touch):
                if m.site_bodyid[site] in (b1, b2):
                    ray = normal if m.site_bodyid[site] == b1 else -normal
                    zone[k] = ray_hits_site(m, tree, site, p, ray)
            group.members.append(Contact(J, (aref[0] - Kd * (distance - margin), aref[1]),
                                         where(distance < margin, D * float(count), 0.0), mu, m.opt.impratio,
                                         elliptic, zone))
    return list(groups.values())


def relative_twist(tree, b1, b2, origin):
    """Planar velocity (x, z at `origin`, about y) of body 2 relative to body 1: three {dof: coefficient}."""
    T = [{}, {}, {}]
    for body, sign in ((b1, -1.0), (b2, 1.0)):
        for d, column in tree.jacobian(body, origin).items():
            turn = 0.0 if tree.anchor[d] is None else tree.axis[d][1]
            for t, value in zip(T, (column[0], column[2], turn)):
                t[d] = t.get(d, 0.0) + sign * value
    return [{d: c for d, c in t.items() if not known(c, 0)} for t in T]


def ray_hits_site(m, tree, site, start, direction):
    """Whether the ray intersects the sphere or ellipsoid of `site`: a t^2 + 2 b t + c = 0 has a root t >= 0."""
    frame = tree.mat[m.site_bodyid[site]] @ rotation(m.site_quat[site])
    sphere = m.site_type[site] == SPHERE
    inverse = const(1.0 / m.site_size[site][[0, 0, 0] if sphere else [0, 1, 2]])
    start, direction = (frame.T @ (start - site_position(m, tree, site))) * inverse, (frame.T @ direction) * inverse
    a, b, c = dot(direction, direction), dot(direction, start), dot(start, start) - 1.0
    return (c < 0.0) | ((b < 0.0) & (a * c < b * b))


# ---- Solver ------------------------------------------------------------------------------------------------
def islands(M, groups):
    """Sets of dofs that neither the mass matrix nor a group couples: [(dofs, groups)]."""
    label = list(range(len(M)))
    touched = [sorted(set().union(*g.T)) for g in groups]
    links = [(i, j) for i in label for j in range(i) if not known(M[i, j], 0)]
    links += [(dofs[0], d) for dofs in touched for d in dofs]
    for i, j in links:
        old, new = label[i], label[j]
        label = [new if k == old else k for k in label]
    return [([d for d in range(len(M)) if label[d] == k],
             [g for g, dofs in zip(groups, touched) if label[dofs[0]] == k]) for k in sorted(set(label))]


def residual(member, y):
    """x = J y - aref, one entry per row of `member`."""
    return [dot(j, y) - aref for j, aref in zip(member.J, member.aref)]


def constrain(M, a0, groups, dtype):
    """Joint accelerations (nv,) that minimise 1/2 (a - a0)' M (a - a0) + costs of the constraints."""
    a = list(a0)
    for dofs, coupled in islands(M, [g for g in groups if any(g.T)]):
        block = M[np.ix_(dofs, dofs)]
        members = [r for g in coupled for r in g.members]
        if len(members) == 1 and isinstance(members[0], Row):  # f = (aref - J a0) / (J M^-1 J' + R), clipped
            r, T = members[0], coupled[0].T[0]
            J = np.array([T.get(d, 0.0) for d in dofs], object)
            MJ = solve(factor(block), J)
            x = residual(r, coupled[0].coordinates(a0))[0]
            f = clip(-(r.D * x) / (r.D * dot(J, MJ) + 1.0), -r.hi, -r.lo)
            for d, value in zip(dofs, MJ):
                a[d] = a0[d] + value * f
        elif members:
            for d, value in zip(dofs, newton(block, dofs, a0, coupled, dtype)):
                a[d] = value
    return np.array(a, object)


def newton(M, dofs, a0, groups, dtype):
    """Primal Newton from the unconstrained acceleration, with a line search where plain steps may cycle.

    On a CPU the iteration ends when the Newton step, before the line search, is within rounding errors in every
    environment of the batch.
    """
    start = np.array([a0[d] for d in dofs], object)
    members = [r for g in groups for r in g.members]
    smooth = all(r.lo == -math.inf if isinstance(r, Row) else not r.elliptic for r in members)
    iterations, evaluations = (5, 0) if smooth and len(dofs) <= 4 else (7, 3)  # enough: tests/test_physics.py

    def iterate(values):
        """(accelerations after an iteration, its Newton step before the line search)."""
        a = np.array([Traced(x) for x in values], object)
        full = dict(zip(dofs, a))
        g, H = M @ (a - start), M.copy()
        xs = []
        for group in groups:
            y, n = group.coordinates(full), len(group.T)
            force, stiffness = zeros(n), zeros(n, n)
            for r in group.members:
                x = residual(r, y)
                xs.append(x)
                gradient, W = r.gradient(x), r.hessian(x)
                for i in range(n):
                    Ji = [j[i] for j in r.J]
                    force[i] = force[i] + dot(gradient, Ji)
                    WJ = [dot(w, Ji) for w in W]
                    for k in range(i + 1):
                        stiffness[i, k] = stiffness[i, k] + dot(WJ, [j[k] for j in r.J])
                        stiffness[k, i] = stiffness[i, k]
            force, stiffness = fusion_barrier(force), fusion_barrier(stiffness)
            T = np.array([[t.get(d, 0.0) for d in dofs] for t in group.T], object)
            g, H = g + T.T @ force, H + T.T @ (stiffness @ T)
        d = solve(factor(H), -g)
        whole = tuple(unwrap(c, dtype) for c in d)
        if evaluations:
            full = dict(zip(dofs, d))
            dxs = [[dot(j, y) for j in r.J] for group in groups for y in [group.coordinates(full)]
                   for r in group.members]
            d = d * line_search(M, a - start, d, members, xs, dxs, dot(g, d), evaluations, dtype)
        return tuple(unwrap(c, dtype) for c in a + d), whole

    values = tuple(jnp.asarray(unwrap(c, dtype)) for c in start)
    if jax.default_backend() == "cpu":
        def turn(state):
            new, whole = iterate(state[1])
            size, change = (reduce(jnp.maximum, map(jnp.abs, x)) for x in (new, whole))
            return state[0] + 1, new, change > jnp.finfo(dtype).eps ** 0.75 * size

        # the cost is piecewise quadratic: after a step within one piece, the next is within rounding errors
        begin = varying(0, values[0]), values, varying(True, values[0])
        values = lax.while_loop(lambda state: (state[0] < iterations) & state[2], turn, begin)[1]
    else:  # unrolled, an iteration is one kernel; without barriers XLA takes minutes to fuse the iterations
        for _ in range(iterations):
            values = lax.optimization_barrier(iterate(values)[0])
    return [Traced(c) for c in values]


def varying(constant, x):
    """The constant, mapped by jax.vmap as x is: vmap traces a loop again for a carry that starts unmapped."""
    return jnp.where(x == x, constant, constant)


def line_search(M, offset, d, members, xs, dxs, slope0, evaluations, dtype):
    """A step length at which the cost has a small derivative: 1 if it has, else by bracketed Newton steps."""
    linear, quadratic = dot(d, M @ offset), dot(d, M @ d)

    def slope(alpha):
        first, second = linear + alpha * quadratic, quadratic
        for r, x, dx in zip(members, xs, dxs):
            at = [x0 + alpha * x1 for x0, x1 in zip(x, dx)]
            first = first + dot(r.gradient(at), dx)
            second = second + dot([dot(w, dx) for w in r.hessian(at)], dx)
        return fusion_barrier([first, second])

    alpha, lo, hi, slope_lo, slope_hi = (Traced(jnp.asarray(unwrap(x, dtype), dtype))
                                         for x in (1.0, 0.0, 1.0, slope0, 0.0))
    for _ in range(evaluations):  # unrolled: a GPU fuses the iterations into one or two kernels
        s, curvature = slope(alpha)
        low = s <= -1e-4 * slope0
        lo, slope_lo = where(low, alpha, lo), where(low, s, slope_lo)
        hi, slope_hi = where(low, hi, alpha), where(low, slope_hi, s)
        newton_step = alpha - s / curvature
        secant = lo - (hi - lo) * slope_lo / maximum(slope_hi - slope_lo, 1e-30)
        inside = (newton_step > lo) & (newton_step < hi)
        alpha = where(lo < 1.0, where(inside, newton_step, secant), 1.0)  # lo = 1: take the full step
    return alpha


# ---- Public functions --------------------------------------------------------------------------------------
def make_step(model, substeps=1, backend="fused"):
    """Compile `model` into one control step.

    Args:
      model: compiled `mujoco.MjModel`. Its constants are read at once: later changes to it have no effect.
      substeps: physics steps of `model.opt.timestep` seconds in a control step.
      backend: "fused" (this file) or "mjx" (MuJoCo's JAX port: slower, covers more models).

    Returns:
      step(qpos (nq,), qvel (nv,), ctrl (nu,), wrap_prm=None) -> (qpos (nq,), qvel (nv,), touch (ntouch,)), in
      the dtype of `qpos` (float32, or float64 under x64), jitted and unbatched: use `jax.vmap`. `ctrl` is
      clipped to its range as in MuJoCo. `touch` holds the normal forces (newtons) of the touch sensors in
      model order, as in dm_control after `Physics.step`: those of the last substep, before its integration.
      `wrap_prm` (nwrap,) replaces `model.wrap_prm`, the coefficients of fixed tendons; with "mjx" it changes
      the motors at these tendons only.
      `jax.jvp` differentiates the step. `jax.grad` does not, on a CPU, if Newton's method solves constraints.

    Raises:
      NotImplementedError: the model has a feature that the fused step lacks; feature and element are named.
      ValueError: unknown backend.
    """
    if backend == "mjx":
        return make_mjx_step(model, substeps)
    if backend != "fused":
        raise ValueError(f'backend must be "fused" or "mjx", not {backend!r}')
    m = model
    check(m)
    touch = m.sensor_objid[m.sensor_type == mujoco.mjtSensor.mjSENS_TOUCH]
    pairs = merge_copies(m, contact_pairs(m), touch)
    h = float(m.opt.timestep)

    @jax.jit
    def step(qpos, qvel, ctrl, wrap_prm=None):
        dtype = qpos.dtype
        wraps = const(m.wrap_prm) if wrap_prm is None else scalars(wrap_prm, dtype)
        tau = actuation(m, scalars(ctrl, dtype), wraps)

        def forward(q, v):
            """Constrained acceleration (nv,), mass matrix (nv, nv) and touch forces."""
            tree = forward_tree(m, q, v)
            M, bias = inertia_and_bias(m, tree)
            force = [tau[d] - bias[d] - float(m.dof_damping[d]) * v[d] for d in range(m.nv)]
            for j in np.flatnonzero(m.jnt_stiffness):
                d, i = m.jnt_dofadr[j], m.jnt_qposadr[j]
                force[d] = force[d] - float(m.jnt_stiffness[j]) * (q[i] - float(m.qpos_spring[i]))
            M, force = fusion_barrier(M), fusion_barrier(force)
            a = solve(factor(M), force)
            forces = [0.0] * len(touch)
            if not disabled(m, "CONSTRAINT"):
                contacts = contact_rows(m, tree, v, pairs, touch)
                a = constrain(M, a, scalar_rows(m, tree, q, v, wraps) + contacts, dtype)
                for contact, y in ((c, group.coordinates(a)) for group in contacts for c in group.members):
                    for k, inside in contact.zone.items():
                        normal = -contact.gradient(residual(contact, y))[0]
                        forces[k] = forces[k] + where(inside, normal, 0.0)
            return a, M, forces

        def euler(q, v):
            a, M, forces = forward(q, v)
            if m.dof_damping.any():
                a = solve(factor(M + const(np.diag(h * m.dof_damping))), M @ a)
            v = v + a * h
            return q + v * h, v, forces

        def runge_kutta(q, v):
            a, _, forces = forward(q, v)
            stages, rates = [v], [a]
            for c in (0.5, 0.5, 1.0):
                stages.append(v + rates[-1] * (c * h))
                rates.append(forward(q + stages[-2] * (c * h), stages[-1])[0])

            def mean(xs):
                return (xs[0] + 2.0 * xs[1] + 2.0 * xs[2] + xs[3]) * (h / 6)

            return q + mean(stages), v + mean(rates), forces

        integrate = runge_kutta if m.opt.integrator == INTEGRATOR.mjINT_RK4 else euler

        def substep(_, state):
            q, v = (np.array([Traced(x) for x in part], object) for part in state[:2])
            return tuple(tuple(jnp.asarray(unwrap(x, dtype)) for x in part) for part in integrate(q, v))

        state = tuple(tuple(x.x for x in scalars(array, dtype)) for array in (qpos, qvel))
        state += ((varying(jnp.zeros((), dtype), qpos[0]),) * len(touch),)
        state = substep(0, state) if substeps == 1 else lax.fori_loop(0, substeps, substep, state)
        return tuple(jnp.stack(part) if part else jnp.zeros(0, dtype) for part in state)

    return step


def actuation(m, ctrl, wrap_prm):
    """Generalised forces (nv,) of motors at joints and fixed tendons: constant during a control step."""
    tau = zeros(m.nv)
    for i in range(m.nu):
        if actuator_disabled(m, i):
            continue
        u = ctrl[i]
        if m.actuator_ctrllimited[i] and not disabled(m, "CLAMPCTRL"):
            u = clip(u, *map(float, m.actuator_ctrlrange[i]))
        force = u * float(m.actuator_gainprm[i, 0])
        if m.actuator_forcelimited[i]:
            force = clip(force, *map(float, m.actuator_forcerange[i]))
        force, target = force * float(m.actuator_gear[i, 0]), m.actuator_trnid[i, 0]
        if m.actuator_trntype[i] == mujoco.mjtTrn.mjTRN_JOINT:
            moment = {m.jnt_dofadr[target]: 1.0}
        else:
            _, moment = tendon(m, None, [0.0] * m.nq, target, wrap_prm)
        for d, c in moment.items():
            tau[d] = tau[d] + force * c
    return tau


class Kinematics(NamedTuple):
    xpos: jax.Array       # (nbody, 3) body origins, world frame, metres
    xmat: jax.Array       # (nbody, 3, 3) body orientations
    xipos: jax.Array      # (nbody, 3) centres of mass
    geom_xpos: jax.Array  # (ngeom, 3)
    site_xpos: jax.Array  # (nsite, 3)


def make_kinematics(model):
    """Forward kinematics of `model`.

    Args:
      model: compiled `mujoco.MjModel`.

    Returns:
      kinematics(qpos (nq,)) -> `Kinematics`, in the dtype of `qpos`. XLA removes unused outputs.

    Raises:
      NotImplementedError: ball or free joints.
    """
    m = model
    check_joints(m)

    def kinematics(qpos):
        dtype = qpos.dtype
        tree = forward_tree(m, scalars(qpos, dtype))

        def stack(values, *shape):
            entries = [jnp.asarray(unwrap(x, dtype), dtype) for x in np.ravel(values)]
            return jnp.stack(entries or [jnp.zeros(0, dtype)]).reshape(shape)

        geoms = [tree.pos[b] + tree.mat[b] @ const(p) for b, p in zip(m.geom_bodyid, m.geom_pos)]
        sites = [site_position(m, tree, s) for s in range(m.nsite)]
        return Kinematics(stack(tree.pos, m.nbody, 3), stack(tree.mat, m.nbody, 3, 3),
                          stack(centres_of_mass(m, tree), m.nbody, 3), stack(geoms, m.ngeom, 3),
                          stack(sites, m.nsite, 3))

    return kinematics


def make_com_velocity(model):
    """Velocity of the centre of mass of all bodies of `model`.

    Args:
      model: compiled `mujoco.MjModel`.

    Returns:
      com_velocity(qpos (nq,), qvel (nv,)) -> (3,) metres per second, in the dtype of `qpos`: MuJoCo's `subtreelinvel`
      sensor at the world.

    Raises:
      NotImplementedError: ball or free joints.
    """
    m = model
    check_joints(m)

    def com_velocity(qpos, qvel):
        dtype = qpos.dtype
        tree, v, momentum = forward_tree(m, scalars(qpos, dtype)), scalars(qvel, dtype), zeros(3)
        for b, centre in enumerate(centres_of_mass(m, tree)):
            for d, column in tree.jacobian(b, centre).items():
                momentum = momentum + column * (v[d] * float(m.body_mass[b]))
        velocity = momentum * (1.0 / float(m.body_mass.sum()))
        return jnp.stack([jnp.asarray(unwrap(x, dtype), dtype) for x in velocity])

    return com_velocity


def make_min_distance(model):
    """Smallest distance between geoms that can collide.

    Args:
      model: compiled `mujoco.MjModel`.

    Returns:
      min_distance(qpos (nq,)) -> () metres, in the dtype of `qpos`: the smallest distance, less margin, of the geom
      pairs that can collide; infinite when there are none. MuJoCo's `ncon == 0` is `min_distance >= 0`.

    Raises:
      NotImplementedError: as make_step.
    """
    m = model
    check_joints(m)
    pairs = contact_pairs(m)
    check_contacts(m, pairs)

    def min_distance(qpos):
        tree, smallest = forward_tree(m, scalars(qpos, qpos.dtype)), math.inf
        for g1, g2 in pairs:
            margin = contact_parameters(m, g1, g2)[3]
            for distance, _, _ in contact_geometry(m, tree, g1, g2):
                smallest = minimum(smallest, distance - margin)
        return jnp.asarray(unwrap(smallest, qpos.dtype), qpos.dtype)

    return min_distance


# ---- MJX backend: MuJoCo's JAX port with the same interface ------------------------------------------------
def make_mjx_step(model, substeps):
    """`make_step` on MuJoCo's JAX port, with the same options (less the energy flag, which it refuses)."""
    from mujoco import mjx
    model = copy.copy(model)
    model.opt.enableflags &= ~int(mujoco.mjtEnableBit.mjENBL_ENERGY)
    for i in range(model.nu):
        if actuator_disabled(model, i):  # MJX does not read this option: a gain of 0 and no bias are the same
            model.actuator_gaintype[i] = model.actuator_biastype[i] = 0
            model.actuator_gainprm[i] = 0.0
    m = mjx.put_model(model)
    adr = model.sensor_adr[model.sensor_type == mujoco.mjtSensor.mjSENS_TOUCH]
    blank = mjx.make_data(model)

    @jax.jit
    def step(qpos, qvel, ctrl, wrap_prm=None):
        dtype = qpos.dtype
        d = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, blank)
        d = d.replace(qpos=qpos, qvel=qvel.astype(dtype), ctrl=ctrl.astype(dtype))
        if wrap_prm is not None:  # MJX needs constants here, so the motors' forces are applied as qfrc_applied
            tau = actuation(model, scalars(ctrl, dtype), scalars(wrap_prm, dtype))
            tau = jnp.stack([jnp.asarray(unwrap(x, dtype), dtype) for x in tau])
            d = d.replace(ctrl=jnp.zeros_like(d.ctrl), qfrc_applied=tau)

        def substep(_, d):  # under x64 MJX returns some integers as int64
            return jax.tree.map(lambda new, old: new.astype(old.dtype), mjx.step(m, d), d)

        d = lax.fori_loop(0, substeps, substep, d)
        return d.qpos, d.qvel, d.sensordata[adr]

    return step


# ---- Refusals ----------------------------------------------------------------------------------------------
def refuse(m, feature, kind=None, index=0):
    name = kind and mujoco.mj_id2name(m, getattr(mujoco.mjtObj, f"mjOBJ_{kind.upper()}"), int(index))
    element = f" ({kind} {repr(name) if name else int(index)})" if kind else ""
    raise NotImplementedError(f'the fused step does not implement {feature}{element}: use backend="mjx"')


def check_joints(m):
    for j in np.flatnonzero(~np.isin(m.jnt_type, (SLIDE, HINGE))):
        refuse(m, "ball and free joints", "joint", j)
    for b in np.flatnonzero(m.body_mocapid >= 0):
        refuse(m, "mocap bodies", "body", b)


def check(m):
    """Raises NotImplementedError for the first feature of `m` that the fused step does not implement."""
    check_joints(m)
    opt, bits = m.opt, mujoco.mjtDisableBit
    if opt.density or opt.viscosity or opt.wind.any():
        refuse(m, "fluid forces (option density, viscosity, wind)")
    if opt.integrator not in (INTEGRATOR.mjINT_EULER, INTEGRATOR.mjINT_RK4, INTEGRATOR.mjINT_IMPLICITFAST):
        refuse(m, f"the integrator {INTEGRATOR(opt.integrator).name}")
    if opt.noslip_iterations:
        refuse(m, "the noslip solver")
    handled = "CONSTRAINT FRICTIONLOSS LIMIT CONTACT GRAVITY CLAMPCTRL FILTERPARENT"
    harmless = "EQUALITY WARMSTART ISLAND MIDPHASE AUTORESET MULTICCD NATIVECCD"
    allowed = sum(int(getattr(bits, f"mjDSBL_{name}")) for name in f"{handled} {harmless}".split())
    for enum, flags in ((bits, opt.disableflags & ~allowed),
                        (mujoco.mjtEnableBit, opt.enableflags & ~int(mujoco.mjtEnableBit.mjENBL_ENERGY))):
        if flags:
            refuse(m, f"the option flag {enum(flags & -flags).name}")

    def wraps(t):
        return m.wrap_type[m.tendon_adr[t]:m.tendon_adr[t] + m.tendon_num[t]]

    def joints(t):
        return m.wrap_objid[m.tendon_adr[t]:m.tendon_adr[t] + m.tendon_num[t]]

    def narrow(bounds, margin):
        return np.array([hi - lo < 2 * gap for (lo, hi), gap in zip(bounds, margin)], bool)

    fixed = [bool((wraps(t) == WRAP.mjWRAP_JOINT).all()) for t in range(m.ntendon)]
    touch, target = m.sensor_type == mujoco.mjtSensor.mjSENS_TOUCH, m.actuator_trnid[:, 0]
    round_zones = (SPHERE, int(GEOM.mjGEOM_ELLIPSOID))
    zones = [t and m.site_type[s] not in round_zones for t, s in zip(touch, m.sensor_objid)]
    for kind, feature, offending in (
            ("equality", "equality constraints", [True] * m.neq), ("flex", "flexes", [True] * m.nflex),
            ("pair", "explicit contact pairs", [True] * m.npair), ("plugin", "plugins", [True] * m.nplugin),
            ("body", "gravity compensation", m.body_gravcomp),
            ("joint", "polynomial stiffness", m.jnt_stiffnesspoly),
            ("joint", "force limits", m.jnt_actfrclimited),
            ("joint", "polynomial damping", m.dof_dampingpoly),  # one dof per joint here
            ("joint", "negative damping", m.dof_damping < 0),
            ("joint", "limits active on both sides", m.jnt_limited & narrow(m.jnt_range, m.jnt_margin)),
            ("tendon", "limits active on both sides",
             m.tendon_limited & narrow(m.tendon_range, m.tendon_margin)),
            ("tendon", "joints twice in a tendon", [f and len(set(joints(t))) < len(joints(t))
                                                    for t, f in enumerate(fixed)]),
            ("tendon", "tendon pulleys and wrapping", [not f and (wraps(t) != WRAP.mjWRAP_SITE).any()
                                                       for t, f in enumerate(fixed)]),
            *(("tendon", f"tendon {field}", getattr(m, f"tendon_{field}"))
              for field in ("stiffness", "stiffnesspoly", "damping", "dampingpoly", "frictionloss",
                            "armature", "actfrclimited")),
            ("actuator", "actuator activations", m.actuator_dyntype),
            ("actuator", "gains other than fixed", m.actuator_gaintype),
            ("actuator", "actuator biases", m.actuator_biastype),
            *(("actuator", f"actuator {field}", getattr(m, f"actuator_{field}"))
              for field in ("delay", "damping", "dampingpoly", "armature")),
            ("actuator", "transmissions other than joints and fixed tendons",
             [t != TRN.mjTRN_JOINT and not (t == TRN.mjTRN_TENDON and fixed[i])
              for t, i in zip(m.actuator_trntype, target)]),
            ("sensor", "touch zones other than spheres and ellipsoids", zones),
            ("sensor", "cutoffs of touch sensors", touch & (m.sensor_cutoff > 0)),
            *(("sensor", f"{field}s of touch sensors", touch & (values > 0))
              for field, values in (("delay", m.sensor_delay), ("interval", m.sensor_interval[:, 0])))):
        for i, bad in enumerate(offending):
            if np.any(bad):
                refuse(m, feature, kind, i)
    check_contacts(m, contact_pairs(m))


def check_contacts(m, pairs):
    """Raises NotImplementedError unless contacts are planar (x-z), of planes, spheres and capsules, with friction."""
    d = mujoco.MjData(m)
    mujoco.mj_kinematics(m, d)
    for g in dict.fromkeys(g for pair in pairs for g in pair):
        if m.geom_type[g] not in (PLANE, SPHERE, CAPSULE):
            refuse(m, f"collisions of type {GEOM(m.geom_type[g]).name}", "geom", g)
        if m.geom_condim[g] != 3:
            refuse(m, f"condim {m.geom_condim[g]} (only 3)", "geom", g)
        if m.geom_gap[g]:
            refuse(m, "contact gaps", "geom", g)
        if getattr(m, "flg_adhesion", 0) or getattr(m, "flg_surfacevel", 0):
            refuse(m, "adhesion and surface velocities of geoms")
        for j in joints_above(m, m.geom_bodyid[g]):
            if abs(abs(d.xaxis[j, 1]) - (m.jnt_type[j] == HINGE)) > 1e-12:
                refuse(m, "contacts of bodies that leave the x-z plane", "joint", j)
        if m.geom_type[g] != SPHERE and abs(d.geom_xmat[g, 5]) > 1e-12:
            refuse(m, "contact tangents outside the x-z plane", "geom", g)
    for g1, g2 in pairs:
        if m.geom_type[g1] == PLANE == m.geom_type[g2]:
            refuse(m, "collisions between planes", "geom", g1)
        if m.geom_type[g1] != PLANE and abs(d.geom_xpos[g1, 1] - d.geom_xpos[g2, 1]) > 1e-12:
            refuse(m, "contact normals outside the x-z plane", "geom", g2)
        if contact_parameters(m, g1, g2)[0] < 1e-5:
            refuse(m, "contacts without friction", "geom", g1)
