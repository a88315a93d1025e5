# An image that serves FlatQuant checkpoints: vLLM's own CUDA image and this package, from public indexes alone.
#   docker build -t vllm-flatquant .
#   docker run --gpus all -p 8000:8000 -v /path/to/checkpoint:/model:ro vllm-flatquant /model --port 8000
ARG VLLM_VERSION=v0.26.0
FROM vllm/vllm-openai:${VLLM_VERSION}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

COPY . /tmp/vllm-flatquant
# PyTorch and Triton stay those that vLLM was built with: the constraint makes pip fail rather than replace them.
RUN python3 -m pip freeze --exclude-editable | grep -iE '^(torch|triton)==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/vllm-flatquant \
    && python3 -c 'import vllm_flatquant.cli' \
    && rm -rf /tmp/vllm-flatquant /tmp/constraints.txt

RUN useradd --create-home --uid 10001 flatquant
USER 10001
WORKDIR /home/flatquant

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["--help"]
