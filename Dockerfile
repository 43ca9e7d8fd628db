# A fresh machine: `docker build -t cachemedic .`, then `docker run cachemedic make test`, or `make reproduce`.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /cachemedic
COPY . .
CMD ["make", "test"]
