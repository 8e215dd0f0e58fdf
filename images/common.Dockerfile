# The part that all images have in common. docker-bake.hcl builds it once for each image (target NAME-common), and
# images/NAME/Dockerfile starts with `FROM common`.
#
# Contexts: base (docker-bake.hcl picks it by BASE), wheels (filled by scripts/wheelhouse.py NAME).
# The order is that of change: wheels, then code, then the version. A change of code reinstalls nothing.
FROM base

RUN --mount=type=bind,source=images/install.sh,target=/install.sh \
    --mount=type=bind,from=wheels,target=/wheels \
    sh /install.sh

ARG IMAGE
ARG PACKAGE
# HOME and the model cache are writable for any user; LOGNAME names a user without an account (getpass asks for it).
ENV PYTHONPATH=/opt/estiba \
    PYTHONUNBUFFERED=1 \
    HOME=/opt/estiba/home \
    LOGNAME=estiba \
    HF_HOME=/opt/estiba/cache/huggingface \
    TOKENIZERS_PARALLELISM=true \
    ESTIBA_WORKLOAD=${PACKAGE}

COPY LICENSE /opt/estiba/
COPY shared/estiba /opt/estiba/estiba
COPY images/${IMAGE}/${PACKAGE} /opt/estiba/${PACKAGE}
# A user's own PYTHONPATH replaces the one above and must not hide the packages.
RUN echo /opt/estiba >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/estiba-path.pth"
# estiba.pth: how the programs of a script end, for PID 1 (platform/hooks). It does nothing outside a script job.
RUN cp /opt/estiba/estiba/platform/hooks/estiba.pth "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# Commands: the image's name, for what a workload offers besides its job (`aura export`), and estiba-stage.
RUN python -m compileall -q /opt/estiba/estiba "/opt/estiba/${PACKAGE}" && \
    printf '#!/bin/sh\nexec python -m %s "$@"\n' "${PACKAGE}" >"/usr/local/bin/${IMAGE}" && \
    printf '#!/bin/sh\nexec python -m estiba.staging "$@"\n' >/usr/local/bin/estiba-stage && \
    chmod 755 "/usr/local/bin/${IMAGE}" /usr/local/bin/estiba-stage
WORKDIR /opt/estiba

ARG ESTIBA_VERSION=0.0.0
ARG ESTIBA_IMAGE_REVISION=
ENV ESTIBA_VERSION=${ESTIBA_VERSION} \
    ESTIBA_IMAGE_REVISION=${ESTIBA_IMAGE_REVISION}

# Exec form makes the job layer PID 1, so TERM reaches it. The SDK's ModelTrainer sends no command; CMD stands in for it.
ENTRYPOINT ["python", "-m", "estiba.platform.entry"]
CMD ["train"]
