"""gpu_evidence turns red for what it must catch, and counts what is known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.evidence import calls, step, verdict
from benchmarks.evidence.case import Bars
from benchmarks.evidence.devices import Device
from benchmarks.evidence.machine_code.architectures import occupancy
from benchmarks.evidence.machine_code.capture import idle_loads
from benchmarks.evidence.machine_code.sass import parse
from benchmarks.evidence.published import PUBLISHED
from benchmarks.model_flops import training_flops

ROOT = Path(__file__).parents[2]
FAULTS = "tests.benchmarks.faults"


def gpu_evidence(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_evidence", "--check", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def missed(tmp_path_factory):
    """The sentences of one checked run over the planted faults, by case."""
    told = tmp_path_factory.mktemp("evidence") / "records.jsonl"
    ended = gpu_evidence("--cases", FAULTS, "--quick", "--arch", 90, "--json", told)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.splitlines()[-1].endswith("MISSED")
    records = [json.loads(line) for line in told.read_text().splitlines()]
    cases = calls.cases_of(FAULTS)
    return {
        case.name: verdict.faults([record for record in records if record["case"] == case.name], cases)
        for case in cases
    }


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("missing_mask", "outside every tensor"),
        ("wrong_scale", "of its budget"),
        ("unwritten_output", "NaN"),
        ("doubled_read", "must be 1.00"),
        ("spilling", "spills"),
    ],
)
def test_a_planted_fault_turns_the_check_red(missed, fault, sentence):
    assert any(sentence in told for told in missed[fault]), missed[fault]


def test_the_sound_kernel_passes_beside_them(missed):
    assert missed["sound"] == []


@pytest.mark.parametrize("known", ["known_traffic.py", "known_numbers.py"])
def test_the_interpreter_and_the_meter_give_known_answers(known):
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--triton", f"tests/benchmarks/{known}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:]


def kernel(**changes):
    sound = {
        "case": "x", "part": "compilation", "name": "streams", "arch": 90, "inputs": "", "spill_stored": 0,
        "spill_loaded": 0, "programs": 2, "limited_by": "", "double_precision": 0, "calls_in_loops": 0, "tensor_cores": {},
        "wide_loads": 1.0, "load_widths": {}, "in_flight": 32 << 10, "not_streaming": "",
    }  # fmt: skip
    return {**sound, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"spill_loaded": 4}, "spills"),
        ({"programs": 0}, "does not fit"),
        ({"double_precision": 1}, "double"),
        ({"wide_loads": 0.89}, "16-byte"),
        ({"in_flight": 31 << 10}, "must be 32"),
        ({"arch": 100, "in_flight": 63 << 10}, "must be 64"),
        ({"arch": 80, "in_flight": 1 << 10}, None),
        ({"name": "asks for more", "in_flight": 47 << 10}, "must be 48"),
        ({"name": "multiplies"}, "no tensor-core"),
        ({"name": "multiplies", "tensor_cores": {"HMMA": 8}}, "no HGMMA"),
        ({"name": "multiplies", "tensor_cores": {"HGMMA": 8}, "in_flight": 0}, None),
        ({"name": "multiplies", "arch": 80, "tensor_cores": {"HMMA": 8}}, None),
        ({"name": "little", "in_flight": 0, "wide_loads": 0.0}, None),
        ({"not_streaming": "float32", "in_flight": 0, "wide_loads": 0.0}, None),
        ({"not_streaming": "float32", "spill_stored": 4}, "spills"),
    ],
)
def test_bars_of_machine_code(changes, sentence):
    bars = Bars(tensor_cores=("multiplies",), not_streaming={"little": "one row"}, in_flight_kib={"asks for more": 48})
    told = list(verdict.of_compilation(kernel(**changes), bars))
    assert (told == []) if sentence is None else (len(told) == 1 and sentence in told[0]), told


def traffic(**changes):
    sound = {
        "case": "x", "part": "traffic", "provider": "fastpt", "forward": 1.0, "backward": 1.1, "together": 1.05,
        "launches": [1, 2], "triton_launches": [1, 2], "host_syncs": 0, "hazards": {}, "flops": 3.0, "saved_beyond": 8,
        "gradient_error": 1e-3,
    }  # fmt: skip
    return {**sound, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"forward": 1.02}, "forward moves 1.02"),
        ({"backward": 1.2}, "backward moves"),
        ({"together": 1.2}, "together moves"),
        ({"launches": [1, 3]}, "3 launches backward"),
        ({"host_syncs": 1}, "waits"),
        ({"hazards": {"ww": 2}}, "race"),
        ({"flops": 4.0}, "multiply-adds"),
        ({"saved_beyond": 9}, "saved"),
        ({"gradient_error": 2e-3}, "error"),
        ({"triton_launches": [0, 0]}, "no Triton kernel"),
        ({"provider": "Liger", "forward": 9.0}, None),
    ],
)
def test_bars_of_traffic(changes, sentence):
    bars = Bars(
        forward=1.0, backward=1.1, together=1.1, launches=(1, 2), flops=3.0, new_saved_bytes=8, gradient_error=1e-3
    )
    told = list(verdict.of_traffic(traffic(**changes), bars))
    assert (told == []) if sentence is None else (len(told) == 1 and sentence in told[0]), told


def test_a_table_entry_that_no_case_reaches_is_missed():
    records = [{"chosen": [["a", 80, 1024]]}, {"name": "a kernel"}]
    assert list(verdict.of_table(records, {("a", 80, 1024)})) == []
    assert "no case reaches a, sm_90" in next(verdict.of_table(records, {("a", 80, 1024), ("a", 90, 1)}))


def test_machine_code_is_read_right():
    lines = [
        "        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;",
        "        /*0010*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ;",
        ".L_x_0:",
        "        /*0020*/                   FADD R0, R5, R8 ;",
        "        /*0030*/                   STL.64 [R1], R4 ;",
        "        /*0040*/                   LDG.E R12, desc[UR4][R2.64] ;",
        "        /*0044*/              @!P1 CALL.REL.NOINC `(.L_x_9) ;",
        "        /*0048*/                   CALL.ABS.NOINC `(helper) ;",
        "        /*0050*/              @!P0 BRA `(.L_x_0) ;",
        "        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;",
        "        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;",
    ]
    code = parse("\n".join(lines))
    assert code.loops == [(0x20, 0x50)]
    assert code.in_flight_bytes == 16 + 8  # both are read before the third is asked for
    assert code.widths("LDG") == {4: 1, 8: 1, 16: 1}
    assert code.spilled_bytes == (8, 0)
    assert code.tensor_cores == {"HGMMA": 1}
    assert code.calls_in_loops == 1


def test_a_load_of_few_elements_counts_by_its_threads():
    code = """
        %row = tt.load %target : !tt.ptr<i64> loc(#loc1)
        %scale = tt.load %p, %mask, %zero : !tt.ptr<f32>
        %block = tt.load %ptrs, %inside, %other : tensor<1024x!tt.ptr<bf16>, #blocked>
        %rstd = ttg.async_copy_global_to_local %r, %s mask %m other %c : tensor<64x!tt.ptr<f32>, #blocked2> -> <64xf32>
    """
    assert idle_loads(code, 256) == {8: 255 / 256, 4: 255 / 256 + 3 / 4, 2: 0}


def test_occupancy_is_what_the_tables_say():
    assert occupancy(90, 32, 4, 0) == (16, "registers")  # all 64 warps
    assert occupancy(90, 255, 8, 0) == (1, "registers")
    assert occupancy(90, 32, 8, 100 << 10) == (2, "shared memory")
    assert occupancy(120, 32, 8, 99 << 10) == (1, "shared memory")
    assert occupancy(86, 16, 32, 0) == (1, "warps")


def test_published_figures_stand_beside_a_case():
    cases = {case.name for module in calls.all_modules() for case in calls.cases_of(module)}
    assert set(PUBLISHED) <= cases


def test_published_figures_add_up():
    for shape, peers in PUBLISHED.values():
        assert shape
        for peer in peers:  # both passes together lie between the two, each weighted by its floor
            assert min(peer.forward, peer.backward) <= peer.together <= max(peer.forward, peer.backward), peer


@pytest.fixture
def tiny(monkeypatch):
    sizes = {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(step.MODELS, "tiny", ("Llama", sizes))
    return step.MODELS["tiny"]


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_counted_step_has_the_flops_of_the_model(tiny, is_fused):
    model = step.build("tiny", 2, is_lora=False, is_fused=is_fused)
    assert step.count(model, 64).ops == step.count(model, 64).ops
    counted = sum(flops for _, _, flops in step.count(model, 64).ops)
    # The diagonal of attention, a head row without a target, and what norms and activations compute, are a few percent.
    assert counted == pytest.approx(training_flops(model, [64], kept=64), rel=0.05)


def test_a_step_grows_with_layers_and_tokens_and_fused_holds_less(tiny):
    plain, fused = (step.step("tiny", 128, is_lora=True, is_fused=is_fused) for is_fused in (False, True))
    model = step.build("tiny", 5, is_lora=True, is_fused=False)
    assert plain.weights == fused.weights == 2 * sum(p.numel() for p in model.parameters())
    assert plain.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = step.count(model, 256)
    assert plain.extra[0] + 128 * plain.extra[1] == pytest.approx(whole.peak_extra, rel=0.02)
    moved = sum(b for _, b, _ in plain.rest) + 5 * sum(b for _, b, _ in plain.layer)
    assert moved == pytest.approx(sum(b for _, b, _ in step.count(model, 128).ops), rel=0.02)
    assert fused.peak_bytes(128) < plain.peak_bytes(128)
    assert fused.longest(1e9) > plain.longest(1e9) > 128
    assert plain.longest(0) == 0
    slow, fast = Device("slow", 1e12, 1e9), Device("fast", 1e12, 2e9)
    assert plain.floor_s(slow) == pytest.approx(2 * plain.floor_s(fast), rel=0.05)
    assert plain.floor_s(slow, is_quantised=True) > plain.floor_s(slow)
