"""One feature of MuJoCo at a time: the fused step obeys it as C does, or refuses the model.

What C obeys and physics.py does not know would give wrong numbers without a word.
"""
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from test_physics import c_step, touch_adr

import physics

# A planar body with an arm over a plane; a feature is one more attribute or element at a named place.
MODEL = """<mujoco>{extension}<option timestep=".005" tolerance="0" {option}><flag {flag}/></option><worldbody>
<geom name="floor" type="plane" size="9 9 1" {floor}/>{world}
<body name="b" pos="0 0 .12" {body}>
 <joint name="x" type="slide" axis="1 0 0"/><joint name="z" type="slide" axis="0 0 1"/>
 <joint name="y" axis="0 1 0"/>
 <geom name="g" type="capsule" size=".05 .1" euler="0 70 0" {geom}/><site name="s" size=".3"/>
 <body name="c" pos=".3 0 .05"><joint name="e" axis="0 1 0" {joint}/>
  <geom name="h" size=".06"/><site name="t" pos="0 0 .1"/></body></body></worldbody>
<tendon><fixed name="f" {tendon}><joint joint="y" coef="1"/><joint joint="e" coef="-.5"/></fixed>{tendons}</tendon>
<actuator>{actuator}</actuator><sensor>{sensor}</sensor>{rest}</mujoco>"""
PLACES = ("extension option flag floor world body geom joint tendon tendons actuator sensor rest").split()


def build(**feature):
    places = {"actuator": '<motor joint="e" gear="2"/>', "flag": 'energy="disable"', **feature}
    return mujoco.MjModel.from_xml_string(MODEL.format(**{place: places.get(place, "") for place in PLACES}))


def motor(attributes):
    return {"actuator": f'<motor joint="e" gear="2" {attributes}/>'}


def general(attributes):
    return {"actuator": f'<general joint="e" {attributes}/>'}


def everything(flag):
    """Forces that the flags disable, with the flag."""
    return dict(flag=f'{flag}="disable"', sensor='<touch site="s"/>',
                joint='stiffness="3" springref="20" frictionloss=".1" range="-5 5" limited="true"',
                **motor('ctrllimited="true" ctrlrange="-.2 .2"'))


OBEYED = {
    "spring, damping, margin": dict(joint='stiffness="3" springref="20" damping=".4" range="-20 20" '
                                          'limited="true" margin=".3" solreflimit=".05 .7"'),
    "friction loss, armature": dict(joint='frictionloss=".3" solreffriction=".05 .7" armature=".1" ref="30"'),
    "a motor's limits": motor('ctrllimited="true" ctrlrange="-.9 .9" forcelimited="true" forcerange="-.2 .2"'),
    "parameters that no type reads": general('gainprm="3" biasprm="1 -2 -.1" dynprm="5" gear="2 3 4 0 0 0"'),
    "a group that is disabled": dict(option='actuatorgroupdisable="0 2"', **motor('group="2"')),
    "the last group that can be disabled": dict(option='actuatorgroupdisable="30"', **motor('group="30"')),
    "a group that is not disabled": dict(option='actuatorgroupdisable="1"', **motor('group="2"')),
    "a group that cannot be disabled": dict(option='actuatorgroupdisable="0"', **motor('group="32"')),
    "a disabled motor beside another": dict(option='actuatorgroupdisable="3"', actuator='<motor joint="e" group="3"/>'
                                        '<motor tendon="f" gear="2"/>'),
    "RK4": dict(option='integrator="RK4"', joint='damping=".4"'),
    "implicitfast": dict(option='integrator="implicitfast"', joint='damping=".4"'),
    "constraints disabled": everything("constraint"),
    "friction loss disabled": everything("frictionloss"),
    "limits disabled": everything("limit"),
    "contacts disabled": everything("contact"),
    "gravity disabled": everything("gravity"),
    "clamping disabled": everything("clampctrl"),
    "override without its flag": dict(option='o_margin=".1" o_solref=".05 1" magnetic="1 0 0"'),
    "gravity to the side": dict(option='gravity="1 2 -3" impratio="4"'),
    "elliptic cones": dict(option='cone="elliptic" impratio="4" solver="CG" iterations="1000"'),
    "the fluid of no fluid": dict(geom='fluidshape="ellipsoid"'),
    "a tendon's limits": dict(tendon='limited="true" range="-.5 .5" margin=".4" solreflimit=".1 .5"'),
    "a string": dict(tendons='<spatial limited="true" range="0 .1"><site site="s"/><site site="t"/></spatial>'),
    "priority": dict(geom='priority="2" friction=".2 .3 .4" solref=".05 1"'),
    "mixing": dict(geom='solmix="5" solref=".05 1" margin=".1"', floor='solmix="0"'),
    "stiffness and damping of a contact": dict(geom='solref="-500 -20" solimp=".5 .9 .1 .3 4"'),
    "a geom that the floor does not touch": dict(geom='contype="2" conaffinity="2"'),
    "a slope": dict(floor='zaxis=".2 0 1" margin=".1"'),
    "a wall": dict(world='<geom size=".1" pos=".2 0 0"/>'),
    "excluded bodies": dict(rest='<contact><exclude body1="b" body2="world"/></contact>'),
    "sensors": dict(sensor='<touch site="s" noise="1"/><accelerometer site="s"/><rangefinder site="t"/>'),
    "a mass that is set": dict(geom='mass="3" shellinertia="true"'),
}
REFUSED = {
    "force limits": dict(joint='actuatorfrcrange="-.1 .1" actuatorfrclimited="true"'),
    "polynomial": dict(joint='stiffness="3 1 2"'),
    "polynomial damping": dict(joint='damping=".3 1 2"'),
    "negative damping": dict(joint='damping="-.2"'),
    "gravity compensation": dict(body='gravcomp="1"'),
    "ball and free": dict(world='<body pos="3 0 1"><freejoint/><geom size=".05"/></body>'),
    "mocap": dict(world='<body mocap="true" pos="3 0 1"><geom size=".05"/></body>'),
    "flexes": dict(world='<flexcomp name="cloth" type="grid" count="2 2 1" spacing=".1 .1 .1" dim="2" '
                         'pos="4 0 1"/>'),
    "biases": general('gainprm="3" biastype="affine" biasprm="1 -2 -.1"'),
    "activations": general('dyntype="integrator" actlimited="true" actrange="-.1 .1"'),
    "activations, early": general('dyntype="filterexact" dynprm=".1" actearly="true"'),
    "activations of muscles": general('dyntype="muscle"'),
    "gains": general('gaintype="affine" gainprm="1 2 3"'),
    "delay": general('delay=".02" nsample="10"'),
    "actuator damping": motor('damping="1"'),
    "actuator armature": motor('armature="1"'),
    "transmissions": dict(actuator='<adhesion body="b" ctrlrange="0 1"/>'),
    "transmissions of sites": dict(actuator='<motor site="t" refsite="s" gear="1 0 0 0 0 0"/>'),
    "transmissions of cranks": dict(actuator='<motor cranksite="t" slidersite="s" cranklength=".1"/>'),
    "transmissions in the parent": dict(actuator='<motor jointinparent="e"/>'),
    "integrator": dict(option='integrator="implicit"'),
    "fluid forces": dict(option='density="100" wind="1 0 0"'),
    "fluid forces, viscous": dict(option='viscosity="1"'),
    "noslip": dict(option='noslip_iterations="4"'),
    "equality": dict(rest='<equality><joint joint1="e" joint2="y"/></equality>'),
    "equality of bodies": dict(rest='<equality><weld body1="c"/></equality>'),
    "equality of points": dict(rest='<equality><connect body1="c" anchor="0 0 0" active="false"/></equality>'),
    "equality of tendons": dict(rest='<equality><tendon tendon1="f"/></equality>'),
    "tendon stiffness": dict(tendon='stiffness="3" springlength="0 .1"'),
    "tendon damping": dict(tendon='damping="2"'),
    "tendon frictionloss": dict(tendon='frictionloss=".2"'),
    "tendon armature": dict(tendon='armature=".2"'),
    "tendon actfrclimited": dict(tendon='actuatorfrcrange="-.1 .1" actuatorfrclimited="true"'),
    "joints twice in a tendon": dict(tendons='<fixed limited="true" range="-.2 .2"><joint joint="e" coef="1"/>'
                                             '<joint joint="y" coef="1"/><joint joint="e" coef="2"/></fixed>'),
    "pulleys": dict(tendons='<spatial><site site="s"/><site site="t"/><pulley divisor="2"/><site site="s"/>'
                            '<site site="t"/></spatial>'),
    "condim": dict(geom='priority="2" condim="1"'),
    "condim of the floor": dict(floor='condim="4"'),
    "gaps": dict(floor='priority="3" gap=".03" margin=".05"'),
    "explicit contact pairs": dict(rest='<contact><pair geom1="g" geom2="floor"/></contact>'),
    "surface velocities": dict(floor='surfacevel="1 0 0"'),
    "without friction": dict(floor='priority="1" friction="0"'),
    "cutoffs": dict(sensor='<touch site="s" cutoff="1"/>'),
    "delays": dict(sensor='<touch site="s" delay=".1" nsample="30"/>'),
    "intervals": dict(sensor='<touch site="s" interval=".1"/>'),
    "plugins": dict(extension='<extension><plugin plugin="mujoco.pid"/></extension>',
                    actuator='<plugin joint="e" plugin="mujoco.pid"/>'),
    **{f"mjDSBL_{flag.upper()}": everything(flag)
       for flag in ("spring", "damper", "actuation", "refsafe", "sensor", "eulerdamp")},
    **{f"mjENBL_{flag.upper()}": dict(flag=f'{flag}="enable"')
       for flag in ("override", "fwdinv", "invdiscrete", "sleep")},
}


@pytest.mark.parametrize("feature", OBEYED)
def test_a_feature_is_obeyed_as_in_c(feature):
    """Two states, one control step, float64, without compiling: an operation at a time is quicker once."""
    model, rng = build(**OBEYED[feature]), np.random.RandomState(0)
    plain, changed, touched = build(), 0.0, 0
    for _ in range(2):
        qpos = model.qpos0 + [0, -0.07, 0, 0] + rng.randn(4) * [0.1, 0.01, 0.1, 0.3]  # in the floor
        qvel = [0, -0.5, 0, 0] + rng.randn(4) * [0.5, 0.1, 1, 1]
        ctrl = rng.uniform(-1.5, 1.5, 2)[:model.nu]
        after = []
        for m in (model, plain):
            data = mujoco.MjData(m)
            data.qpos[:], data.qvel[:], data.ctrl[:] = qpos, qvel, ctrl[-m.nu:]
            mujoco.mj_forward(m, data)
            touched += data.ncon
            c_step(m, data, 1)
            after.append(data)
        with jax.enable_x64(True), jax.disable_jit():
            got = physics.make_step(model)(*(jnp.asarray(x) for x in (qpos, qvel, ctrl)))
        expected = after[0].qpos, after[0].qvel, after[0].sensordata[touch_adr(model)]
        for ours, theirs in zip(got, expected):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        changed = max(changed, np.abs(after[0].qvel - after[1].qvel).max())
    neutral = ("not disabled", "cannot be", "no type", "without its flag", "no fluid", "sensors")
    assert touched and (changed > 1e-6 or any(word in feature for word in neutral)), "the feature does nothing"


def test_other_features_are_refused_by_name():
    for feature, places in REFUSED.items():
        with pytest.raises(NotImplementedError, match=feature.split(" of ")[0].split(" in ")[0].split(",")[0]):
            physics.make_step(build(**places))


def test_mjx_obeys_disabled_groups():
    """MJX itself does not read them."""
    actuators = '<motor joint="e" gear="2" group="1"/><position joint="y" kp="3" group="4"/>'
    model = build(option='actuatorgroupdisable="1 4" solver="Newton"', actuator=actuators, flag='contact="disable"')
    data = mujoco.MjData(model)
    data.ctrl[:] = 1.0
    mujoco.mj_forward(model, data)
    c_step(model, data, 1)
    with jax.enable_x64(True):
        qpos, qvel, _ = physics.make_step(model, 1, "mjx")(jnp.array(model.qpos0), jnp.zeros(4), jnp.ones(2))
    np.testing.assert_allclose(qvel, data.qvel, rtol=0, atol=1e-9)
    assert (model.actuator_gainprm[:, 0] != 0).all()  # the caller's model is as it was
